"""Stage 3: train encoder and decoder together, on pictures.

Each picture goes through the network once a step, with all of its captions. The layers
below the first unfrozen one only infer: they run without autograd, with BatchNorm folded.
Above it convolutions and BatchNorm's scale and shift learn, while its statistics stay
those of ImageNet: batches are far too small to estimate them anew.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy
import torch
from torch import Tensor

from pipeline.captioner import encoder_of
from pipeline.checkpoint import Checkpoint, load_checkpoint, load_together, save_checkpoint
from pipeline.consensus import choose_neighbours, sampled_pictures
from pipeline.dataset import EncodedCaptions, encode_captions, load_table, tokenised
from pipeline.devices import inference_batch_size
from pipeline.encoder import TRUNK_LAYERS, Encoder, encode_all, fold_for_inference
from pipeline.ensemble import CaptionDecoder
from pipeline.errors import InputError, UserError
from pipeline.features import FEATURE_SIZE
from pipeline.images import (
    IMAGE_SIZE,
    ImageError,
    Picture,
    augmented_square,
    load_image,
    prefetch,
    unreadable_images,
)
from pipeline.matching import train_matcher
from pipeline.picture_sources import open_source
from pipeline.progress import progress_bar
from pipeline.report import epoch_reporter
from pipeline.report_data import describe_data
from pipeline.run_folder import open_run
from pipeline.tokenizers import ENGLISH
from pipeline.training import SEED_STRIDE, Phase, Progress, TrainingConfig, Watcher, train
from pipeline.validation import Validation, Validator
from pipeline.vocabulary import END_ID, UNKNOWN_ID, Vocabulary

# A picture whose captions tell sides is never flipped.
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class JointOptions:
    """The options of ``finetune_joint.py`` that decide the result.

    Attributes are explained by ``python finetune_joint.py --help``.
    """

    start: tuple[str, ...]
    data: str
    captions: str | None
    weights: str | None
    features: str
    epochs: int
    batch_size: int
    accumulate: int
    encoder_lr: float
    decoder_lr: float
    weight_decay: float
    label_smoothing: float
    average: float
    unfreeze_from: str
    smallest_crop: float
    flip: bool
    patience: int
    seed: int
    precision: str


@dataclass
class TrainingPicture:
    """One training picture: where it is, and whether it may be flipped."""

    picture: Picture
    flip: bool


@dataclass
class JointBatch:
    """Pictures with all their captions.

    Attributes:
        pixels: uint8 (B, 299, 299, 3).
        picture: int64 (C,): which of the B pictures each caption is of.
        captions: int64 (C, T), padded.
    """

    pixels: Tensor
    picture: Tensor
    captions: Tensor


@dataclass
class JointStage:
    """Encoder, decoder, pictures and captions, as ``training.train`` wants them."""

    encoder: Encoder
    decoder: CaptionDecoder
    vocabulary: Vocabulary
    pictures: Sequence[TrainingPicture]
    captions: EncodedCaptions
    val_pictures: Sequence[Picture]
    validator: Validator
    options: JointOptions
    workers: int
    device: torch.device
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cut = TRUNK_LAYERS.index(self.options.unfreeze_from)
        # The frozen layers are copied before folding: a checkpoint keeps them as they were.
        self.frozen = copy.deepcopy(self.encoder.trunk[:cut])
        fold_for_inference(self.frozen, self.options.precision)
        self.unfrozen = self.encoder.trunk[cut:]
        self.encoder.requires_grad_(False)
        self.unfrozen.requires_grad_(True)
        self.unfrozen.to(memory_format=torch.channels_last)
        self.first_caption = self.captions.first_of_picture

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Encoder and decoder, each with its learning rate."""
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

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of pictures."""
        return -(-len(self.pictures) // self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[JointBatch]:
        """Give batches of augmented pictures with their captions, in a new order.

        A picture that cannot be read is passed over and remembered.
        """
        seed = self.options.seed * SEED_STRIDE + epoch
        order = torch.randperm(
            len(self.pictures), generator=torch.Generator().manual_seed(seed)
        ).tolist()

        def read(number: int) -> numpy.ndarray | ImageError:
            picture = self.pictures[number]
            # Chance belongs to the picture and the epoch, whichever thread reads it.
            random = Random(seed * len(self.pictures) + number)
            try:
                image = load_image(picture.picture, 2 * IMAGE_SIZE)
            except ImageError as error:
                return error
            flip = self.options.flip and picture.flip
            return augmented_square(image, random, flip, self.options.smallest_crop)

        size = self.options.batch_size
        squares = zip(order, prefetch(read, order, self.workers, ahead=2 * size), strict=True)
        numbers: list[int] = []
        pixels: list[numpy.ndarray] = []
        for number, square in squares:
            if isinstance(square, ImageError):
                self.unreadable[str(self.pictures[number].picture)] = str(square)
                continue
            numbers.append(number)
            pixels.append(square)
            if len(numbers) == size:
                yield self._batch(numbers, pixels)
                numbers, pixels = [], []
        if numbers:
            yield self._batch(numbers, pixels)

    def _batch(self, numbers: list[int], pixels: list[numpy.ndarray]) -> JointBatch:
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
        """Cross-entropy of all captions of the batch's pictures."""
        pixels = self.encoder.normalise(batch.pixels.to(self.device, non_blocking=True))
        # Few at a time, as in extraction: what lies between two layers then stays in the cache.
        few = pixels.split(inference_batch_size(self.device))
        with torch.no_grad():
            hidden = torch.cat([self.frozen(part) for part in few])
        features = self.unfrozen(hidden).flatten(1).float()  # (B, 2048)
        return self.decoder.loss(
            features[batch.picture.to(self.device)],
            batch.captions.to(self.device),
            self.options.label_smoothing,
        )

    def facts(self) -> dict[str, float]:
        """Nothing else."""
        return {}

    def validate(self) -> Validation:
        """Encode the val pictures with the present encoder, and score the decoder on them."""
        encoder = copy.deepcopy(self.encoder)
        encoder.precision = self.options.precision
        encoder.for_inference()
        features = torch.zeros(len(self.val_pictures), self.decoder.config.feature_size)
        for batch in encode_all(encoder, self.val_pictures, self.workers):
            if batch.failures:
                number, reason = next(iter(batch.failures.items()))
                raise InputError(
                    f"{self.val_pictures[number]}: {reason}, though it was whole before"
                )
            features[batch.keys] = torch.from_numpy(batch.features)
        return self.validator.validate(self.decoder, features)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Describe the present weights, the encoder's among them."""
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


def may_flip(captions: Sequence[str]) -> bool:
    """Tell whether a mirrored picture still agrees with its captions."""
    return not any(SIDES.search(caption) for caption in captions)


def refuse_strange_words(captions: EncodedCaptions, source: Path, start: Path) -> None:
    """Say aloud how many words of the training captions the starting run does not know, if many.

    Raises:
        UserError: it does not know most of them, as where the captions are of another language.
    """
    words = captions.tokens[captions.tokens > END_ID]
    share = float((words == UNKNOWN_ID).float().mean())
    if share > 0.5:
        raise UserError(
            f"{source}: {100 * share:.0f} % of its words are unknown to --start {start}, which "
            "learns no new ones here; train a decoder on these captions: train_decoder.py"
        )
    if share > 0.05:
        click.echo(
            f"{100 * share:.0f} % of the captions' words are unknown to {start}, which learns no "
            "new ones",
            err=True,
        )


def finetune_joint(
    options: JointOptions,
    run: Path,
    device: torch.device,
    workers: int,
    force: bool,
    watchers: Sequence[Watcher] = (),
) -> tuple[Progress, Mapping[str, str]]:
    """Fine-tune the runs ``options.start`` in the folder ``run``, or go on with that.

    ``watchers`` are those of ``training.train``.

    Returns:
        The state at the end, and the pictures that could not be read, with reasons.

    Raises:
        UserError: pictures, captions, the starting run or its encoder are missing or do not
            belong together; the run there has other settings.
    """
    if options.unfreeze_from not in TRUNK_LAYERS[:-1]:
        raise UserError(
            f"--unfreeze-from {options.unfreeze_from}: no such block; one of "
            f"{', '.join(TRUNK_LAYERS[:-1])}"
        )
    starts = [Path(start) for start in options.start]
    for path in starts:
        if run.resolve() in (path.resolve(), path.resolve().parent):
            raise UserError(f"--run {run}: is the run that --start names; give another folder")
    source = open_source(options.data)
    captions_file = Path(options.captions) if options.captions else None
    last = run / "last.pt"
    resumed = last.is_file() and not force
    start = load_together([last] if resumed else starts)
    table, names = load_table(source, captions_file, source.names)
    tokenizer = start.vocabulary.tokenizer.name
    train_captions = tokenised(table.of_split("train"), tokenizer)
    val_captions = tokenised(table.of_split("val"), tokenizer)
    val_pictures = {name: source.picture(names[name]) for name in val_captions}
    broken = unreadable_images([*val_pictures.values()], workers)
    val_captions = {n: group for n, group in val_captions.items() if val_pictures[n] not in broken}
    for split, images in (("train", train_captions), ("val", val_captions)):
        if not images:
            raise UserError(f"{table.source}: no picture is in the {split} split")
    encoder = encoder_of(start, None if resumed else options.weights, "fp32")
    encoder.source = str(run / "best.pt")
    splits = {f"{split}_images": table.split_hash(split) for split in ("train", "val")}
    open_run(run, {**asdict(options), **splits}, force)
    validator = Validator(val_captions, start.vocabulary)
    described = describe_data(
        *(table, source, names, train_captions, val_captions, start.vocabulary, validator.samples)
    )
    raw = {image.name: image.captions for image in table.images}
    english = tokenizer == ENGLISH
    if options.flip and not english:
        click.echo(
            "no picture is flipped: which words say left and right is known for English alone",
            err=True,
        )
    captions = encode_captions(train_captions.values(), start.vocabulary)
    refuse_strange_words(captions, table.source, starts[0])
    stage = JointStage(
        encoder=encoder.to(device),
        decoder=start.build_decoder().to(device),
        vocabulary=start.vocabulary,
        pictures=[
            TrainingPicture(source.picture(names[name]), english and may_flip(raw[name]))
            for name in train_captions
        ],
        captions=captions,
        val_pictures=[val_pictures[name] for name in val_captions],
        validator=validator,
        options=options,
        workers=workers,
        device=device,
        unreadable={str(picture): reason for picture, reason in broken.items()},
    )
    learning = sum(parameter.numel() for parameter in stage.unfrozen.parameters())
    click.echo(
        f"{len(stage.pictures):,} training pictures with {len(stage.captions):,} captions; "
        f"{options.unfreeze_from} and above learn ({learning:,} weights), "
        f"{options.precision} on {device.type}",
        err=True,
    )
    config = TrainingConfig(
        (Phase(options.epochs),),
        options.patience,
        options.seed,
        options.precision,
        accumulate=options.accumulate,
        average=options.average,
    )
    watchers = [*watchers, epoch_reporter(run, described)]
    progress = train(stage, run, config, score_start=True, watchers=watchers)
    add_second_opinions(stage, run)
    return progress, stage.unreadable


def add_second_opinions(stage: JointStage, run: Path) -> None:
    """Give ``best.pt`` of a finished run its neighbours and its matcher (see ``reranking``).

    For that the training pictures are encoded once more, as they are, by the encoder that was
    chosen: of many a sample.
    """
    best = load_checkpoint(run)
    if best.matcher is not None:
        return
    kept = sampled_pictures(len(stage.pictures))
    encoder = encoder_of(best, None, stage.options.precision).for_inference().to(stage.device)
    features = torch.zeros(len(kept), FEATURE_SIZE, dtype=torch.float16)
    whole = torch.zeros(len(kept), dtype=torch.bool)
    pictures = [stage.pictures[number].picture for number in kept.tolist()]
    with progress_bar(total=len(pictures), unit="image", desc="encoding train") as bar:
        for batch in encode_all(encoder, pictures, stage.workers):
            features[batch.keys] = torch.from_numpy(batch.features).half()
            whole[batch.keys] = True
            stage.unreadable |= {str(pictures[key]): why for key, why in batch.failures.items()}
            bar.update(len(batch.keys) + len(batch.failures))
    features, kept = features[whole], kept[whole]
    decoder = best.build_decoder().to(stage.device)
    batches = (part.float() for part in features.split(4096))
    best.neighbours = choose_neighbours(decoder, kept, batches, stage.captions)
    best.matcher = train_matcher(
        features,
        best.neighbours.captions,
        len(stage.vocabulary),
        (decoder.feature_mean, decoder.feature_scale),
        stage.options.seed,
        stage.device,
    )
    save_checkpoint(run / "best.pt", best)
