"""The public API: images in, captions out.

>>> captioner = Captioner.load()  # the pretrained model; or Captioner.load("runs/decoder")
>>> captioner.caption("a.jpg")
'a dog runs through the grass'
>>> captioner.caption(["a.jpg", "b.jpg"])
['a dog runs through the grass', 'two children play on a beach']
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy
import torch
from PIL import Image

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import Caption, as_sentence, caption_features
from pipeline.decoding.explain import Explanation
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.decoding.reranking import Reranker, reranker_of
from pipeline.features.encode_images import EncodedBatch, encode_batches
from pipeline.models.checkpoint import encoder_of, load_ensemble
from pipeline.models.encoder import CELLS, Encoder
from pipeline.models.ensemble import CaptionDecoder
from pipeline.models.openvino import choose_engine
from pipeline.models.pretrained import PRETRAINED
from pipeline.utils.devices import (
    choose_device,
    choose_precision,
    cpu_has_int8,
    default_workers,
    inference_batch_size,
)
from pipeline.utils.errors import InputError

StrPath = str | os.PathLike[str]
ImageInput = StrPath | Image.Image | numpy.ndarray
SINGLE_IMAGE = (str, os.PathLike, Image.Image, numpy.ndarray)
# The encoder is fastest with small batches, the decoder with large ones: this many images are
# collected for one search.
SEARCHED_AT_ONCE = 32

# A forked child has none of its parent's OpenMP threads, and would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass(frozen=True)
class Prediction:
    """The captions of one image, or why it has none.

    Attributes:
        path: the image, as it was given.
        captions: best first; empty if the image could not be read.
        error: why the image could not be read, else None.
    """

    path: str
    captions: list[Caption]
    error: str | None = None


class Captioner:
    """An encoder, the decoder that was trained on its features, its vocabulary and rerankers."""

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
            model: a run folder or a checkpoint; by default the pretrained model. Several, with the
                same encoder, vocabulary and recipe, become an ensemble.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            weights: the encoder's weights, if they were moved since training.
            precision: of the encoder: ``auto``, ``fp32``, ``bf16``, ``fp16`` or ``int8``, which
                needs OpenVINO, where ``auto`` chooses it if the CPU has VNNI.
            engine: ``torch``, or ``auto``: OpenVINO on a CPU if it is installed, which pays off
                for hundreds of images.

        Raises:
            UserError: no such checkpoint, or the encoder's weights are not those that the
                decoder was trained with.
        """
        models = [model] if isinstance(model, str | os.PathLike) else model
        checkpoint = load_ensemble([Path(path) for path in models])
        chosen = choose_device(device)
        engine = choose_engine(engine, chosen, precision=precision)
        if precision == "auto" and engine == "openvino" and cpu_has_int8():
            precision = "int8"  # up to 3 times faster, with equal scores (docs/speed.md)
        precision = choose_precision(precision, chosen)
        encoder = encoder_of(checkpoint, weights, precision)
        encoder.for_inference(engine).to(chosen)
        return cls(
            encoder,
            checkpoint.build_decoder().to(chosen),
            checkpoint.vocabulary,
            reranker_of(checkpoint).to(chosen),
        )

    def search_config(self, options: SearchOptions | None = None) -> SearchConfig:
        """Return how this model searches captions; see ``SearchOptions.resolve``."""
        options = options or SearchOptions()
        return options.resolve(self.vocabulary, self.reranker, self.decoder.config.members)

    @overload
    def caption(
        self, images: ImageInput, options: SearchOptions | None = None, **more: Any
    ) -> str: ...

    @overload
    def caption(
        self, images: Iterable[ImageInput], options: SearchOptions | None = None, **more: Any
    ) -> list[str]: ...

    def caption(
        self,
        images: ImageInput | Iterable[ImageInput],
        options: SearchOptions | None = None,
        *,
        batch_size: int | None = None,
        **search: Any,
    ) -> str | list[str]:
        """Return the best caption of each image, in order; for a single image, one string.

        See ``stream`` for the arguments.

        Raises:
            InputError: an image cannot be read; ``stream`` reports it and continues.
        """
        if isinstance(images, SINGLE_IMAGE):
            return self.caption([images], options, batch_size=batch_size, **search)[0]
        stream = self.stream(images, options, batch_size=batch_size, **search)
        return [_best(prediction).text for prediction in stream]

    def stream(
        self,
        images: Iterable[ImageInput],
        options: SearchOptions | None = None,
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        details: bool = False,
        sentence: bool = False,
        explain: bool = False,
        **search: Any,
    ) -> Iterator[Prediction]:
        """Caption a stream of images; memory use does not grow with their number.

        Args:
            images: paths, Pillow images or uint8 arrays (H, W, 3) in RGB.
            options: how to search.
            batch_size: images per batch; by default 4 on a CPU, 64 elsewhere.
            workers: threads that decode and encode; by default ``devices.default_workers``.
            details: return the probability of each word as well.
            sentence: begin captions with a capital letter, and end them with a period.
            explain: with ``details``, also return each image part's contribution to each word of
                the best caption; PyTorch encodes, whatever the engine.
            search: fields of ``options``, such as ``num_captions=3``.

        Yields:
            A prediction for every image, in order, including unreadable ones. Its ``path`` is
            "image 0", "image 1" and so on for images without one.
        """
        config = self.search_config(replace(options or SearchOptions(), **search))
        device = self.decoder.feature_mean.device
        batch_size = batch_size or inference_batch_size(device)
        workers = workers or default_workers(device)
        if isinstance(images, Sized):  # a single batch gets all cores
            workers = max(1, min(workers, -(-len(images) // batch_size)))
        paths: dict[int, str] = {}

        def batches() -> Iterator[list[tuple[int, ImageInput]]]:
            numbered = enumerate(images)
            while batch := list(islice(numbered, batch_size)):
                for key, image in batch:
                    if isinstance(image, str | os.PathLike):
                        paths[key] = os.fspath(image)
                    else:
                        paths[key] = f"image {key}"
                yield batch

        def predictions(group: Sequence[EncodedBatch]) -> Iterator[Prediction]:
            found: dict[int, list[Caption]] = {}
            keys = [key for encoded in group for key in encoded.keys]
            if keys:
                features = numpy.concatenate([encoded.features for encoded in group])
                cells = numpy.concatenate([encoded.cells for encoded in group])
                captions = caption_features(
                    self.decoder,
                    torch.from_numpy(features).to(device),
                    config,
                    self.reranker,
                    self.vocabulary,
                    most=config.num_captions,
                    details=details,
                    cells=torch.from_numpy(cells).to(device) if explain else None,
                    keys=[zlib.crc32(os.fsencode(Path(paths[key]).name)) for key in keys],
                )
                if sentence:
                    captions = [[as_sentence(caption) for caption in group] for group in captions]
                found = dict(zip(keys, captions, strict=True))
            failures = {key: why for encoded in group for key, why in encoded.failures.items()}
            for key in sorted([*found, *failures]):
                yield Prediction(paths.pop(key), found.get(key, []), failures.get(key))

        group: list[EncodedBatch] = []
        for encoded in encode_batches(self.encoder, batches(), workers, explain):
            group.append(encoded)
            if sum(len(member.keys) + len(member.failures) for member in group) >= SEARCHED_AT_ONCE:
                yield from predictions(group)
                group = []
        yield from predictions(group)

    def explain(
        self, image: ImageInput, options: SearchOptions | None = None, **search: Any
    ) -> Explanation:
        """Caption an image, and return which parts of it support each word.

        See ``stream`` for the arguments.

        Raises:
            InputError: the image cannot be read.
        """
        [prediction] = self.stream([image], options, details=True, explain=True, **search)
        caption = _best(prediction)
        cells = numpy.array([word.cells for word in caption.words], numpy.float32)
        return Explanation(
            caption.text,
            tuple(word.text for word in caption.words),
            numpy.array([word.probability for word in caption.words], numpy.float32),
            cells.reshape(-1, CELLS, CELLS),
        )


def _best(prediction: Prediction) -> Caption:
    """Return an image's best caption; InputError if the image cannot be read."""
    if prediction.error is not None:
        raise InputError(f"{prediction.path}: {prediction.error}")
    return prediction.captions[0]
