"""Stage 2: train the decoder on cached features."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.consensus import choose_neighbours, sampled_pictures
from pipeline.dataset import (
    EncodedCaptions,
    PictureFeatures,
    bucketed_batches,
    count_batches,
    encode_captions,
    feature_statistics,
    load_table,
    rows_of,
    tokenised,
)
from pipeline.decoder import Decoder, DecoderConfig
from pipeline.distributed import ALONE, Job
from pipeline.errors import UserError
from pipeline.features import DONE, EncoderIdentity, FeatureCache
from pipeline.matching import train_matcher
from pipeline.picture_sources import open_source
from pipeline.report import epoch_reporter
from pipeline.report_data import ReportData, describe_data
from pipeline.run_folder import open_run
from pipeline.self_critical import SAMPLES, SelfCritical
from pipeline.terminal import say
from pipeline.tokenizers import ENGLISH
from pipeline.training import SEED_STRIDE, Progress, Watcher, train
from pipeline.training_config import Phase, TrainingConfig
from pipeline.validation import Validation, Validator
from pipeline.vocabulary import Vocabulary


@dataclass(frozen=True)
class DecoderOptions:
    """The options of ``train_decoder.py`` that decide the result.

    Attributes are explained by ``python train_decoder.py --help``.
    """

    data: str
    captions: str | None
    features: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    embed_size: int
    hidden_size: int
    dropout: float
    feature_dropout: float
    image_state: bool
    tied: bool
    average: float
    min_count: int
    self_critical_epochs: int
    self_critical_lr: float
    self_critical_truth: float
    patience: int
    seed: int
    precision: str
    tokenizer: str = ENGLISH


@dataclass
class CaptionBatch:
    """Captions to learn by heart: features (B, 2048) and captions (B, T), padded."""

    features: Tensor
    captions: Tensor


@dataclass
class PictureBatch:
    """Pictures to draw captions for: features (B, 2048) and the pictures' numbers (B,)."""

    features: Tensor
    pictures: Tensor


@dataclass
class DecoderStage:
    """The decoder, its captions and features, as ``training.train`` wants them."""

    decoder: Decoder
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    features: PictureFeatures
    captions: EncodedCaptions
    validator: Validator
    val_features: PictureFeatures
    options: DecoderOptions
    device: torch.device
    job: Job = ALONE

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All weights in one group."""
        return [
            {
                "params": list(self.decoder.parameters()),
                "lr": self.options.lr,
                "weight_decay": self.options.weight_decay,
            }
        ]

    def config(self) -> TrainingConfig:
        """Say how to train: epochs on people's captions, then self-critical ones."""
        options = self.options
        plain = options.epochs - options.self_critical_epochs
        tokens = int((self.captions.lengths - 1).sum())  # that are predicted: all but <start>
        phases = (
            Phase(plain, divisor=tokens / self.batches_per_epoch(1)),
            Phase(options.self_critical_epochs, options.self_critical_lr / options.lr),
        )
        return TrainingConfig(
            phases, options.patience, options.seed, options.precision, average=options.average
        )

    def is_self_critical(self, epoch: int) -> bool:
        """Tell whether an epoch, counted from 1, learns from drawn captions."""
        return epoch > self.options.epochs - self.options.self_critical_epochs

    @property
    def pictures_a_batch(self) -> int:
        """Pictures whose drawn captions make a batch."""
        return max(1, self.options.batch_size // SAMPLES)

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of captions, or of pictures to draw captions for."""
        if self.is_self_critical(epoch):
            return -(-len(self.features) // self.pictures_a_batch)
        return count_batches(len(self.captions), self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[CaptionBatch | PictureBatch | None]:
        """Give this process's share of captions of like length, or of pictures, in a new order."""
        generator = torch.Generator().manual_seed(self.options.seed * SEED_STRIDE + epoch)
        if self.is_self_critical(epoch):
            self.self_critical.reset()
            order = torch.randperm(len(self.features), generator=generator)
            for batch in order.split(self.pictures_a_batch):
                pictures = self.job.share(batch)
                yield PictureBatch(self.features[pictures], pictures) if len(pictures) else None
            return
        for batch in bucketed_batches(self.captions.lengths, self.options.batch_size, generator):
            yield self._caption_batch(self.job.share(batch))

    def _caption_batch(self, indices: Tensor) -> CaptionBatch | None:
        if not len(indices):
            return None
        features = self.features[self.captions.pictures[indices]]
        return CaptionBatch(features, self.captions.padded(indices))

    @functools.cached_property
    def self_critical(self) -> SelfCritical:
        """What self-critical epochs need, made when the first one begins."""
        return SelfCritical(self.captions, self.options.self_critical_truth, self.validator.search)

    def set_training(self, training: bool) -> None:
        """Switch dropout."""
        self.decoder.train(training)

    def loss(self, batch: CaptionBatch | PictureBatch) -> tuple[Tensor, int]:
        """Cross-entropy of a batch of captions, or the self-critical loss of pictures."""
        features = batch.features.to(self.device, non_blocking=True)
        smoothing = self.options.label_smoothing
        if isinstance(batch, PictureBatch):
            return self.self_critical.loss(self.decoder, features, batch.pictures, smoothing)
        captions = batch.captions.to(self.device, non_blocking=True)
        return self.decoder.loss(features, captions, smoothing)

    def facts(self) -> dict[str, float]:
        """The mean reward of the captions drawn, if any were."""
        if "self_critical" not in vars(self):
            return {}
        critic = self.self_critical
        rewards, drawn = self.job.add_up(critic.rewards, critic.drawn)
        return {"reward": 100 * rewards / drawn} if drawn else {}

    def validate(self) -> Validation:
        """Loss, scores and some captions on val."""
        return self.validator.validate(self.decoder, self.val_features, self.job)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Describe the present weights."""
        kept = sampled_pictures(len(self.features))
        features = (self.features[pictures] for pictures in kept.split(4096))
        return Checkpoint(
            decoder_config=self.decoder.config,
            decoder_weights={k: v.cpu() for k, v in self.decoder.state_dict().items()},
            vocabulary=self.vocabulary,
            encoder=self.encoder,
            neighbours=choose_neighbours(self.decoder, kept, features, self.captions),
            epoch=epoch,
            scores=scores,
            settings=asdict(self.options),
        )


def train_decoder(
    options: DecoderOptions,
    run: Path,
    device: torch.device,
    memory: float,
    force: bool,
    watchers: Sequence[Watcher] = (),
    job: Job = ALONE,
) -> Progress:
    """Train a decoder in the folder ``run``, or go on with the training there.

    Args:
        options: what decides the result.
        run: the run folder.
        device: where to train.
        memory: bytes that features may take; more are read from the cache batch by batch.
        force: start over, whatever the folder holds.
        watchers, job: see ``training.train``.

    Raises:
        UserError: captions or features are missing, do not belong together, or leave train
            or val empty; the run there has other settings.
    """
    stage, data = prepare_stage(options, run, device, memory, force, job)
    watchers = [*watchers, epoch_reporter(run, data)]
    progress = train(stage, run, stage.config(), watchers=watchers, job=job)
    if job.rank == 0:
        add_matcher(stage, run)
    return progress


def add_matcher(stage: DecoderStage, run: Path) -> None:
    """Give ``best.pt`` of a finished run its matcher (see ``matching``)."""
    best = load_checkpoint(run)
    if best.matcher is None:
        best.matcher = train_matcher(
            stage.features,
            stage.captions,
            len(stage.vocabulary),
            (best.decoder_weights["feature_mean"], best.decoder_weights["feature_scale"]),
            stage.options.seed,
            stage.device,
        )
        save_checkpoint(run / "best.pt", best)


def prepare_stage(
    options: DecoderOptions,
    run: Path,
    device: torch.device,
    memory: float,
    force: bool,
    job: Job = ALONE,
) -> tuple[DecoderStage, ReportData]:
    """Read captions and features, open the run folder, and build the decoder.

    See ``train_decoder``. Of the captions' text only that of val is kept.

    Returns:
        The stage, and what the report tells of its data.
    """
    cache = FeatureCache(Path(options.features))
    source = open_source(options.data)
    captions_file = Path(options.captions) if options.captions else None
    table, names = load_table(source, captions_file, cache.names(DONE))
    train_captions = tokenised(table.of_split("train"), options.tokenizer)
    val_captions = tokenised(table.of_split("val"), options.tokenizer)
    for split, images in (("train", train_captions), ("val", val_captions)):
        if not images:
            raise UserError(f"{table.source}: no picture with features is in the {split} split")
    last = run / "last.pt"
    force = job.starts_over(force)
    saved = job.from_first(lambda: load_checkpoint(last) if last.is_file() and not force else None)
    if saved is not None:
        vocabulary = saved.vocabulary
        mismatch = saved.encoder.mismatch(cache.identity)
        if mismatch:
            raise UserError(
                f"{options.features}: other features than {run} began with ({mismatch})"
            )
    else:
        vocabulary = Vocabulary.build(
            (words for group in train_captions.values() for words in group),
            options.min_count,
            options.tokenizer,
        )
    train_rows = rows_of(cache, [names[name] for name in train_captions])
    val_rows = rows_of(cache, [names[name] for name in val_captions])
    splits = {f"{split}_images": table.split_hash(split) for split in ("train", "val")}
    open_run(run, {**asdict(options), **splits}, force, job)
    features = PictureFeatures(cache, train_rows, memory)
    val_features = PictureFeatures(cache, val_rows, memory - features.size)
    decoder = build_decoder(options, len(vocabulary))
    if saved is not None:
        decoder.load_state_dict(saved.decoder_weights)
    else:
        decoder.standardise_by(*feature_statistics(features))
    captions = encode_captions(train_captions.values(), vocabulary)
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    say(
        f"{len(captions):,} training captions, {len(vocabulary):,} words in the vocabulary, "
        f"{weights:,} weights, {options.precision} on {device.type}",
        err=True,
    )
    validator = Validator(val_captions, vocabulary)
    data = describe_data(
        *(table, source, names, train_captions, val_captions, vocabulary, validator.samples)
    )
    stage = DecoderStage(
        decoder=decoder.to(device),
        vocabulary=vocabulary,
        encoder=cache.identity,
        features=features,
        captions=captions,
        validator=validator,
        val_features=val_features,
        options=options,
        device=device,
        job=job,
    )
    return stage, data


def build_decoder(options: DecoderOptions, vocabulary_size: int) -> Decoder:
    """Make an untrained decoder, its weights drawn by the seed."""
    torch.manual_seed(options.seed)
    return Decoder(
        DecoderConfig(
            vocabulary_size=vocabulary_size,
            embed_size=options.embed_size,
            hidden_size=options.hidden_size,
            dropout=options.dropout,
            feature_dropout=options.feature_dropout,
            image_state=options.image_state,
            tied=options.tied,
        )
    )
