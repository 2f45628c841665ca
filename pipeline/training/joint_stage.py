"""The model and data of stage 3: encoder and decoder, trained together on images.

Each image passes the network once per epoch, with all of its captions. The layers below the first
unfrozen one run without autograd and with BatchNorm folded. Above it, convolutions and BatchNorm's
scale and shift are trained, while its statistics stay those of ImageNet: batches are far too small
to estimate them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.datasets.image_sources import stop_if_unreachable
from pipeline.datasets.images import IMAGE_SIZE, ImageError, ImageRef, augmented_square, load_image
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.encode_images import encode_distributed
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import TRUNK_LAYERS, Encoder, fold_for_inference
from pipeline.models.ensemble import CaptionDecoder
from pipeline.training.options import JointOptions
from pipeline.training.stage import SEED_STRIDE, Phase, TrainingConfig
from pipeline.training.validation import Validation, Validator
from pipeline.utils.devices import inference_batch_size
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
    """Images with all their captions.

    Attributes:
        pixels: uint8 (B, 299, 299, 3).
        image: int64 (C,): which of the B images each caption is of.
        captions: int64 (C, T), padded.
    """

    pixels: Tensor
    image: Tensor
    captions: Tensor


@dataclass
class JointStage:
    """Encoder and decoder with their images and captions: a ``stage.Stage``."""

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
        self.first_caption = self.captions.first_of_image

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Decoder and encoder, each with its learning rate."""
        decay = self.options.weight_decay
        return [
            {
                "params": list(self.decoder.parameters()),
                "lr": self.options.decoder_lr,
                "weight_decay": decay,
            },
            {
                "params": list(self.unfrozen.parameters()),
                "lr": self.options.encoder_lr,
                "weight_decay": decay,
            },
        ]

    def config(self) -> TrainingConfig:
        """One phase of all epochs."""
        phases = [Phase(self.options.epochs)]
        return TrainingConfig.of(self.options, phases, self.options.grad_accum_steps)

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of images."""
        return -(-len(self.images) // self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[JointBatch | None]:
        """Yield this process's share of batches of augmented images with their captions, shuffled.

        An image that cannot be read is skipped and recorded in ``unreadable``. Each process reads
        its share of the next images, and all exchange which could not be read: so they agree on
        the batches, which are those of a single process.
        """
        seed = self.options.seed * SEED_STRIDE + epoch
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(seed)
        ).tolist()

        def read(number: int) -> numpy.ndarray | ImageError:
            photo = self.images[number]
            # Seeded by image and epoch, whichever thread reads it.
            random = Random(seed * len(self.images) + number)
            try:
                image = load_image(photo.image, 2 * IMAGE_SIZE)
            except ImageError as error:
                return error
            flip = self.options.flip and photo.flip
            return augmented_square(image, random, flip, self.options.min_crop)

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

    def _batch(self, batch: list[int], squares: dict[int, numpy.ndarray]) -> JointBatch | None:
        """Return this process's share of a batch: its images in ``squares``, which are removed."""
        numbers = [number for number in batch if number in squares]
        if not numbers:
            return None
        pixels = [squares.pop(number) for number in numbers]
        ranges = [
            torch.arange(int(self.first_caption[n]), int(self.first_caption[n + 1]))
            for n in numbers
        ]
        counts = torch.tensor([len(indices) for indices in ranges])
        return JointBatch(
            torch.from_numpy(numpy.stack(pixels)),
            torch.repeat_interleave(torch.arange(len(numbers)), counts),
            self.captions.padded(torch.cat(ranges)),
        )

    def set_training(self, training: bool) -> None:
        """Switch the decoder's dropout; the encoder stays in eval mode, see the module."""
        self.decoder.train(training)

    def loss(self, batch: JointBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy of all captions of the batch's images."""
        pixels = self.encoder.normalize(batch.pixels.to(self.device, non_blocking=True))
        # Few at a time, as in extraction: activations then stay in the core's cache.
        few = pixels.split(inference_batch_size(self.device))
        with torch.no_grad():
            hidden = torch.cat([self.frozen(part) for part in few])
        features = self.unfrozen(hidden).flatten(1).float()  # (B, 2048)
        return self.decoder.loss(
            features[batch.image.to(self.device)],
            batch.captions.to(self.device),
            self.options.label_smoothing,
        )

    def extra_metrics(self) -> dict[str, float]:
        """Return none."""
        return {}

    def validate(self) -> Validation:
        """Encode the val images with the current encoder, and score the decoder on them."""
        encoder = copy.deepcopy(self.encoder)
        encoder.precision = self.options.precision
        encoder.for_inference()
        features, failures = encode_distributed(encoder, self.val_images, self.workers, self.world)
        if failures:
            number, reason = next(iter(failures.items()))
            raise InputError(
                f"{self.val_images[number]}: {reason}, although it was readable before"
            )
        return self.validator.validate(self.decoder, features, self.world)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Return the current weights, including the encoder's."""
        self.encoder.forget_identity()
        return Checkpoint(
            decoder_config=self.decoder.config,
            decoder_weights={k: v.cpu() for k, v in self.decoder.state_dict().items()},
            vocabulary=self.vocabulary,
            encoder=self.encoder.identity,
            encoder_weights={
                k: v.cpu().contiguous() for k, v in self.encoder.trunk.state_dict().items()
            },
            epoch=epoch,
            scores=scores,
            settings=asdict(self.options),
        )
