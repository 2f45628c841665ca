"""The model and data of stage 3: encoder and decoder, trained together on images.

Each image passes through the network once per epoch, with all its captions. Layers below the first
unfrozen one run without autograd and with BatchNorm folded. Above it, convolutions and BatchNorm's
scale and shift are trained, while its statistics stay those of ImageNet: batches are far too small
to estimate them.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.datasets.image_sources import stop_if_unreachable
from pipeline.datasets.images import IMAGE_SIZE, ImageError, ImageRef, augmented_square, load_image
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.encode_images import encode_distributed
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import TRUNK_LAYERS, Encoder, fold_for_inference
from pipeline.models.ensemble import CaptionDecoder
from pipeline.training.options import JointOptions
from pipeline.training.stage import SEED_STRIDE, Phase, Stage
from pipeline.training.validation import Validation, Validator
from pipeline.utils.devices import (
    autocast,
    default_workers,
    inference_batch_size,
    threads_per_worker,
)
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import InputError
from pipeline.utils.threads import prefetch


@dataclass
class TrainingImage:
    """A training image, and whether it may be flipped."""

    image: ImageRef
    flip: bool


@dataclass
class JointBatch:
    """Images with all their captions."""

    pixels: Tensor  # uint8 (B, 299, 299, 3)
    image: Tensor  # int64 (C,): index of each caption's image
    captions: Tensor  # int64 (C, T), padded


@dataclass
class JointStage(Stage):
    """Encoder and decoder with their images and captions."""

    encoder: Encoder
    decoder: CaptionDecoder
    vocabulary: Vocabulary
    images: Sequence[TrainingImage]
    captions: EncodedCaptions
    val_images: Sequence[ImageRef]
    validator: Validator
    options: JointOptions
    workers: int
    device: torch.device
    unreadable: dict[str, str] = field(default_factory=dict)
    world: World = SINGLE_PROCESS

    def __post_init__(self) -> None:
        cut = TRUNK_LAYERS.index(self.options.unfreeze_from)
        # The frozen layers are copied before folding: a checkpoint keeps them as they were.
        self.frozen = copy.deepcopy(self.encoder.trunk[:cut])
        fold_for_inference(self.frozen, self.options.precision)
        self.unfrozen = self.encoder.trunk[cut:]
        self.encoder.requires_grad_(False)
        self.unfrozen.requires_grad_(True)
        self.unfrozen.to(memory_format=torch.channels_last)
        self.grad_accum_steps = self.options.grad_accum_steps

    def parameter_groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        """Return the parameters of decoder and encoder."""
        return [
            (self.decoder.parameters(), self.options.decoder_lr),
            (self.unfrozen.parameters(), self.options.encoder_lr),
        ]

    def phases(self) -> Sequence[Phase]:
        """Return a single phase with all epochs."""
        return [Phase(self.options.epochs)]

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of images."""
        return -(-len(self.images) // self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[JointBatch | None]:
        """Yield this process's share of batches of augmented images with their captions, shuffled.

        An image that cannot be read is skipped and recorded in ``unreadable``. The processes
        exchange these failures, so the batches are the same as with a single process.
        """
        seed = self.options.seed * SEED_STRIDE + epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator).tolist()
        read = functools.partial(self._read, seed)
        size = self.options.batch_size
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        mine = [number for group in groups for number in self.world.share(group)]
        ahead = 2 * -(-size // self.world.size)
        squares = zip(mine, prefetch(read, mine, self.workers, ahead), strict=True)
        readable: list[int] = []  # images of the next batches, of all processes
        pixels: dict[int, numpy.ndarray] = {}  # of this process's images
        for group in groups:
            failures: dict[int, str] = {}
            for number, square in itertools.islice(squares, len(self.world.share(group))):
                if isinstance(square, ImageError):
                    stop_if_unreachable(self.images[number].image)
                    failures[number] = str(square)
                else:
                    pixels[number] = square
            for part in self.world.all_gather(failures):
                failures |= part
            for number in group:
                if number in failures:
                    self.unreadable[str(self.images[number].image)] = failures[number]
                else:
                    readable.append(number)
            if len(readable) >= size:
                yield self._batch(readable[:size], pixels)
                readable = readable[size:]
        if readable:
            yield self._batch(readable, pixels)

    def _read(self, seed: int, number: int) -> numpy.ndarray | ImageError:
        """Return an augmented image, the same in any thread, or the error if it is unreadable."""
        random = Random(seed * len(self.images) + number)
        photo = self.images[number]
        try:
            image = load_image(photo.image, 2 * IMAGE_SIZE)
        except ImageError as error:
            return error
        flip = self.options.flip and photo.flip
        return augmented_square(image, random, flip, self.options.min_crop)

    def _batch(self, batch: list[int], squares: dict[int, numpy.ndarray]) -> JointBatch | None:
        """Return this process's share of a batch: its images in ``squares``, which are removed."""
        numbers = [number for number in batch if number in squares]
        if not numbers:
            return None
        pixels = numpy.stack([squares.pop(number) for number in numbers])
        captions = self.captions.of_images(torch.tensor(numbers))
        padded = captions.padded(torch.arange(len(captions)))
        return JointBatch(torch.from_numpy(pixels), captions.images, padded)

    def loss(self, batch: JointBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy of all captions of the batch's images."""
        pixels = self.encoder.normalize(batch.pixels.to(self.device, non_blocking=True))
        if self.device.type == "cpu":
            parts = pixels.split(-(-len(pixels) // default_workers(self.device)))
            features = _InThreads.apply(self._encode, parts, *self.unfrozen.parameters())
        else:
            features = self._encode(pixels)
        return self.decoder.loss(
            features[batch.image.to(self.device)],
            batch.captions.to(self.device),
            self.options.label_smoothing,
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return features (B, 2048) of normalized images, with gradients of unfrozen layers."""
        # Small chunks, as in extraction, keep the activations in the core's cache.
        few = pixels.split(inference_batch_size(self.device))
        with autocast(self.device, self.options.precision):
            with torch.no_grad():
                hidden = torch.cat([self.frozen(part) for part in few])
            return self.unfrozen(hidden).flatten(1).float()

    def validate(self) -> Validation:
        """Encode the val images with the current encoder, and score the decoder on them."""
        encoder = copy.deepcopy(self.encoder)
        encoder.precision = self.options.precision
        encoder.for_inference()
        features, failures = encode_distributed(encoder, self.val_images, self.workers, self.world)
        if failures:
            number, reason = next(iter(failures.items()))
            image = self.val_images[number]
            raise InputError(f"{image}: {reason}, although it was readable before")
        return self.validator.validate(self.decoder, features, self.world)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Return the current weights, including the encoder's."""
        self.encoder.forget_identity()
        weights = {name: tensor.cpu() for name, tensor in self.encoder.trunk_weights().items()}
        return self._checkpoint(epoch, scores, self.encoder.identity, encoder_weights=weights)


Part = TypeVar("Part")
Result = TypeVar("Result")


def _in_threads(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Apply ``function`` to all parts in parallel, each with a share of torch's threads."""
    with threads_per_worker(len(parts)) as share, ThreadPoolExecutor(len(parts)) as threads:

        def one(part: Part) -> Result:
            torch.set_num_threads(share)
            return function(part)

        return list(threads.map(one, parts))


class _InThreads(torch.autograd.Function):
    """Run a function and its backward pass on parts of a batch in parallel, with few threads each.

    In a convolution's backward pass, oneDNN's threads busy-wait for each other. If another program
    occupies the core of one of two threads, they take 5 times as long as a single thread.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], parts: Sequence[Tensor], *trained: Tensor
    ) -> Tensor:
        ctx.trained, ctx.results = trained, _in_threads(function, parts)
        return torch.cat([result.detach() for result in ctx.results])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        split = gradients[0].split([len(result) for result in ctx.results])

        def one(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(pair[0], ctx.trained, pair[1])

        found = _in_threads(one, list(zip(ctx.results, split, strict=True)))
        return None, None, *(sum(parts[1:], parts[0]) for parts in zip(*found, strict=True))
