"""The public interface: images in, captions out.

>>> captioner = Captioner.load()  # the one in the box; or Captioner.load("runs/decoder")
>>> captioner.caption(["a.jpg", "b.jpg"])
['a dog runs through the grass', 'two children play on a beach']
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import Caption, captions_of, detailed_captions
from pipeline.decoding.reranking import (
    Reranker,
    best_captions,
    diverse_captions,
    reranker_of,
    search_config,
)
from pipeline.decoding.search import SearchConfig
from pipeline.features.encode_images import EncodedBatch, encode_batches
from pipeline.models.checkpoint import encoder_of, load_ensemble
from pipeline.models.encoder import Encoder
from pipeline.models.ensemble import CaptionDecoder
from pipeline.models.openvino import choose_engine
from pipeline.models.pretrained import PRETRAINED
from pipeline.utils.devices import (
    choose_device,
    choose_precision,
    default_workers,
    inference_batch_size,
)
from pipeline.utils.errors import InputError, UserError

StrPath = str | os.PathLike[str]
# The encoder likes small batches, the decoder, whose weights pass through the cache for every
# word, large ones: this many images wait for one search.
SEARCHED_AT_ONCE = 32


@dataclass(frozen=True)
class Prediction:
    """What became of one image.

    Attributes:
        path: the image, as it was given.
        captions: best first; empty if the image could not be read.
        error: why it could not be read, else None.
    """

    path: str
    captions: list[Caption]
    error: str | None = None


class Captioner:
    """An encoder and a decoder that belong together.

    Attributes:
        encoder: images to features; checked to be the one that the decoder was trained on.
        decoder: features to captions.
        vocabulary: the decoder's words.
        reranker: the second opinions on captions that the model has.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: CaptionDecoder,
        vocabulary: Vocabulary,
        reranker: Reranker | None = None,
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.reranker = reranker or Reranker()

    @classmethod
    def load(
        cls,
        model: StrPath | Sequence[StrPath] = PRETRAINED,
        device: str = "auto",
        weights: str | None = None,
        precision: str = "auto",
        engine: str = "torch",
    ) -> Captioner:
        """Load a checkpoint, or the best one of a run folder, and its encoder.

        Args:
            model: ``best.pt`` of a run, or the run's folder; by default the model that comes with
                the program. Of several, which must be of one encoder, vocabulary and recipe, the
                decoders caption together (``ensemble``).
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            weights: where the encoder's weights are, if not where they were in training;
                a checkpoint of stage 3 has them inside and needs none.
            precision: of the encoder: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
            engine: ``torch``, which is ready at once, or ``auto``, which takes OpenVINO on a CPU
                where it is installed: some seconds to start, for hundreds of images.

        Raises:
            UserError: no such checkpoint, or the encoder's weights are not those that the
                decoder was trained with.
        """
        models = [model] if isinstance(model, str | os.PathLike) else model
        checkpoint = load_ensemble([Path(path) for path in models])
        chosen = choose_device(device)
        encoder = encoder_of(checkpoint, weights, choose_precision(precision, chosen))
        encoder.for_inference(choose_engine(engine, chosen)).to(chosen)
        return cls(
            encoder,
            checkpoint.build_decoder().to(chosen),
            checkpoint.vocabulary,
            reranker_of(checkpoint).to(chosen),
        )

    def search_config(
        self,
        beam_size: int | None = None,
        consensus: float | None = None,
        matching: float | None = None,
        least: int = 1,
        *,
        rounds: int = 1,
        min_length: int = SearchConfig.min_length,
        max_length: int | None = None,
        prefix: str = "",
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        diversity: float = 0.0,
    ) -> SearchConfig:
        """Choose how to search for this model.

        Args:
            beam_size, consensus, matching: see ``reranking.search_config``.
            least: how many captions an image are wanted.
            rounds: how often to search for captions to choose among.
            min_length, max_length: fewest and most words in a caption; by default 1, and 20 or what
                the language needs (``tokenizers``).
            prefix: words that every caption begins with.
            temperature, top_p: where one is given, captions are drawn; see ``SearchConfig``.
            seed: of the draws. What is drawn for an image depends on it and on the name of the
                image's file alone, not on other images.
            diversity: of several captions, see ``SearchConfig``.

        Raises:
            UserError: the options contradict each other, the model lacks a second opinion that is
                asked for, or does not know a word of the prefix.
        """
        if max_length is None:
            max_length = self.vocabulary.tokenizer.longest
        sampling = temperature is not None or top_p is not None
        if sampling and diversity:
            raise UserError("--diverse: drawn captions differ anyway; leave out --temperature")
        if min_length > max_length:
            raise UserError(
                f"--min-length {min_length}: must not be above --max-length {max_length}"
            )
        words = self.vocabulary.tokenize(prefix)
        unknown = [word for word in words if word not in self.vocabulary]
        if unknown:
            raise UserError(
                f"--prefix: the model does not know {unknown[0]!r}; it has "
                f"{len(self.vocabulary):,} words"
            )
        if len(words) > max_length:
            raise UserError(
                f"--prefix: has {len(words)} words, more than --max-length {max_length}"
            )
        return search_config(
            self.reranker,
            *(beam_size, consensus, matching, least, self.decoder.config.members, sampling),
            rounds=rounds,
            min_length=min_length,
            max_length=max_length,
            prefix=tuple(self.vocabulary.encode(words)),
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
            diversity=diversity,
        )

    def caption(
        self,
        images: Sequence[StrPath],
        beam_size: int | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> list[str]:
        """Caption images: one text for each, in their order.

        Args:
            images: paths.
            beam_size: hypotheses kept an image; by default see ``search_config``.
            batch_size: images a batch; by default 4 on a CPU, 64 elsewhere.
            max_length: most words in a caption; by default 20, or 40 where characters are tokens.

        Raises:
            InputError: an image cannot be read; ``stream`` reports it and goes on.
        """
        config = self.search_config(beam_size, max_length=max_length)
        texts = []
        for prediction in self.stream(images, config, batch_size=batch_size):
            if prediction.error is not None:
                raise InputError(f"{prediction.path}: {prediction.error}")
            texts.append(prediction.captions[0].text)
        return texts

    def stream(
        self,
        images: Iterable[StrPath],
        config: SearchConfig | None = None,
        num_captions: int = 1,
        batch_size: int | None = None,
        workers: int | None = None,
        details: bool = False,
    ) -> Iterator[Prediction]:
        """Caption images as they come, decoding ahead; memory does not grow with their number.

        Args:
            images: paths.
            config: how to search; by default see ``search_config``.
            num_captions: captions an image, at most ``config.beam_size`` without diversity.
            batch_size: images a batch; by default 4 on a CPU, 64 elsewhere.
            workers: threads that decode and encode; by default ``devices.default_workers``.
            details: give each word's probability too.

        Yields:
            A prediction for every path, in their order, also for those that cannot be read.
        """
        config = config or self.search_config(least=num_captions)
        device = self.decoder.feature_mean.device
        batch_size = batch_size or inference_batch_size(device)
        workers = workers or default_workers(device)
        if isinstance(images, Sized):  # a single batch gets all cores
            workers = max(1, min(workers, -(-len(images) // batch_size)))
        paths: dict[int, str] = {}

        def batches() -> Iterator[list[tuple[int, Path]]]:
            batch: list[tuple[int, Path]] = []
            for key, image in enumerate(images):
                paths[key] = os.fspath(image)
                batch.append((key, Path(image)))
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch

        def predictions(group: Sequence[EncodedBatch]) -> Iterator[Prediction]:
            found: dict[int, list[Caption]] = {}
            keys = [key for encoded in group for key in encoded.keys]
            if keys:
                features = numpy.concatenate([encoded.features for encoded in group])
                names = [Path(paths[key]).name for key in keys]
                captions = self._caption_features(
                    torch.from_numpy(features).to(device), names, config, num_captions, details
                )
                found = dict(zip(keys, captions, strict=True))
            failures = {key: why for encoded in group for key, why in encoded.failures.items()}
            for key in sorted([*found, *failures]):
                yield Prediction(paths.pop(key), found.get(key, []), failures.get(key))

        group: list[EncodedBatch] = []
        for encoded in encode_batches(self.encoder, batches(), workers):
            group.append(encoded)
            if sum(len(member.keys) + len(member.failures) for member in group) >= SEARCHED_AT_ONCE:
                yield from predictions(group)
                group = []
        yield from predictions(group)

    def _caption_features(
        self,
        features: torch.Tensor,
        names: Sequence[str],
        config: SearchConfig,
        num_captions: int,
        details: bool,
    ) -> list[list[Caption]]:
        """Caption features (B, 2048) of images with these file names."""
        if config.diversity:
            found = diverse_captions(self.decoder, features, config, self.reranker, num_captions)
        else:
            keys = [zlib.crc32(os.fsencode(name)) for name in names]
            found = best_captions(self.decoder, features, config, self.reranker, keys)
        best = [hypotheses[:num_captions] for hypotheses in found]
        if details:
            return detailed_captions(self.decoder, features, best, self.vocabulary)
        return [captions_of(hypotheses, self.vocabulary) for hypotheses in best]
