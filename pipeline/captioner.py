"""The public interface: images in, captions out.

>>> captioner = Captioner.load()  # the one in the box; or Captioner.load("runs/decoder")
>>> captioner.caption(["a.jpg", "b.jpg"])
['a dog runs through the grass', 'two children play on a beach']
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy
import torch

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import Caption, captions_of, detailed_captions
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.decoding.reranking import (
    Reranker,
    best_captions,
    diverse_captions,
    reranker_of,
)
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
from pipeline.utils.errors import InputError

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
            model: a run folder or a checkpoint; by default the pretrained model. Several, of one
                encoder, vocabulary and recipe, become an ensemble.
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

    def search_config(self, options: SearchOptions | None = None) -> SearchConfig:
        """Return how this model searches captions with these options.

        Raises:
            UserError: the model lacks a reranker that is asked for, or does not know a word of the
                prefix.
        """
        options = options or SearchOptions()
        return options.resolve(self.vocabulary, self.reranker, self.decoder.config.members)

    @overload
    def caption(
        self, images: StrPath, options: SearchOptions | None = None, **more: Any
    ) -> str: ...

    @overload
    def caption(
        self, images: Iterable[StrPath], options: SearchOptions | None = None, **more: Any
    ) -> list[str]: ...

    def caption(
        self,
        images: StrPath | Iterable[StrPath],
        options: SearchOptions | None = None,
        *,
        batch_size: int | None = None,
        **search: Any,
    ) -> str | list[str]:
        """Return the best caption of each image, in their order; of a single path one string.

        Args:
            images: paths, or one path.
            options: how to search.
            batch_size: images per batch; by default 4 on a CPU, 64 elsewhere.
            search: fields of ``options``, such as ``beam_size=5``.

        Raises:
            InputError: an image cannot be read; ``stream`` reports it and continues.
        """
        single = isinstance(images, str | os.PathLike)
        paths = [images] if isinstance(images, str | os.PathLike) else images
        texts = []
        for prediction in self.stream(paths, options, batch_size=batch_size, **search):
            if prediction.error is not None:
                raise InputError(f"{prediction.path}: {prediction.error}")
            texts.append(prediction.captions[0].text)
        return texts[0] if single else texts

    def stream(
        self,
        images: Iterable[StrPath],
        options: SearchOptions | None = None,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        details: bool = False,
        **search: Any,
    ) -> Iterator[Prediction]:
        """Caption images one after the other; memory does not grow with their number.

        Args:
            images: paths.
            options: how to search.
            batch_size: images per batch; by default 4 on a CPU, 64 elsewhere.
            workers: threads that decode and encode; by default ``devices.default_workers``.
            details: return the probability of each word as well.
            search: fields of ``options``, such as ``num_captions=3``.

        Yields:
            A prediction for every path, in their order, unreadable images included.
        """
        config = self.search_config(replace(options or SearchOptions(), **search))
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
                    torch.from_numpy(features).to(device), names, config, details
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
        details: bool,
    ) -> list[list[Caption]]:
        """Caption features (B, 2048) of images with these file names."""
        if config.diversity:
            found = diverse_captions(self.decoder, features, config, self.reranker)
        else:
            keys = [zlib.crc32(os.fsencode(name)) for name in names]
            found = best_captions(self.decoder, features, config, self.reranker, keys)
        best = [hypotheses[: config.num_captions] for hypotheses in found]
        if details:
            return detailed_captions(self.decoder, features, best, self.vocabulary)
        return [captions_of(hypotheses, self.vocabulary) for hypotheses in best]
