"""Stage 2: train the decoder on cached features."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import (
    EncodedCaptions,
    bucketed_batches,
    count_batches,
    encode_captions,
    load_table,
    tokenized,
)
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.tokenizers import ENGLISH
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.cache import DONE, FeatureCache
from pipeline.features.feature_set import FeatureSet, feature_statistics, rows_of
from pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.neighbours import choose_neighbours, sampled_images
from pipeline.training.loop import SEED_STRIDE, Progress, train
from pipeline.training.matcher_training import train_matcher
from pipeline.training.run_folder import open_run
from pipeline.training.self_critical import SAMPLES, SelfCritical
from pipeline.training.stage import EpochCallback, Phase, TrainingConfig
from pipeline.training.validation import Validation, Validator
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo


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
    init_state_from_image: bool
    tie_embeddings: bool
    ema_decay: float
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
class ImageBatch:
    """Images to draw captions for: features (B, 2048) and the images' numbers (B,)."""

    features: Tensor
    images: Tensor


@dataclass
class DecoderStage:
    """The decoder, its captions and features, as ``training.train`` wants them."""

    decoder: Decoder
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    features: FeatureSet
    captions: EncodedCaptions
    validator: Validator
    val_features: FeatureSet
    options: DecoderOptions
    device: torch.device
    world: World = SINGLE_PROCESS

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
            phases, options.patience, options.seed, options.precision, ema_decay=options.ema_decay
        )

    def is_self_critical(self, epoch: int) -> bool:
        """Tell whether an epoch, counted from 1, learns from drawn captions."""
        return epoch > self.options.epochs - self.options.self_critical_epochs

    @property
    def images_a_batch(self) -> int:
        """Images whose drawn captions make a batch."""
        return max(1, self.options.batch_size // SAMPLES)

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of captions, or of images to draw captions for."""
        if self.is_self_critical(epoch):
            return -(-len(self.features) // self.images_a_batch)
        return count_batches(len(self.captions), self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[CaptionBatch | ImageBatch | None]:
        """Give this process's share of captions of like length, or of images, in a new order."""
        generator = torch.Generator().manual_seed(self.options.seed * SEED_STRIDE + epoch)
        if self.is_self_critical(epoch):
            self.self_critical.reset()
            order = torch.randperm(len(self.features), generator=generator)
            for batch in order.split(self.images_a_batch):
                images = self.world.share(batch)
                yield ImageBatch(self.features[images], images) if len(images) else None
            return
        for batch in bucketed_batches(self.captions.lengths, self.options.batch_size, generator):
            yield self._caption_batch(self.world.share(batch))

    def _caption_batch(self, indices: Tensor) -> CaptionBatch | None:
        if not len(indices):
            return None
        features = self.features[self.captions.images[indices]]
        return CaptionBatch(features, self.captions.padded(indices))

    @functools.cached_property
    def self_critical(self) -> SelfCritical:
        """What self-critical epochs need, made when the first one begins."""
        return SelfCritical(self.captions, self.options.self_critical_truth, self.validator.search)

    def set_training(self, training: bool) -> None:
        """Switch dropout."""
        self.decoder.train(training)

    def loss(self, batch: CaptionBatch | ImageBatch) -> tuple[Tensor, int]:
        """Cross-entropy of a batch of captions, or the self-critical loss of images."""
        features = batch.features.to(self.device, non_blocking=True)
        smoothing = self.options.label_smoothing
        if isinstance(batch, ImageBatch):
            return self.self_critical.loss(self.decoder, features, batch.images, smoothing)
        captions = batch.captions.to(self.device, non_blocking=True)
        return self.decoder.loss(features, captions, smoothing)

    def facts(self) -> dict[str, float]:
        """The mean reward of the captions drawn, if any were."""
        if "self_critical" not in vars(self):
            return {}
        critic = self.self_critical
        rewards, drawn = self.world.all_reduce(critic.rewards, critic.drawn)
        return {"reward": 100 * rewards / drawn} if drawn else {}

    def validate(self) -> Validation:
        """Loss, scores and some captions on val."""
        return self.validator.validate(self.decoder, self.val_features, self.world)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Describe the present weights."""
        kept = sampled_images(len(self.features))
        features = (self.features[images] for images in kept.split(4096))
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
    callbacks: Sequence[EpochCallback] = (),
    world: World = SINGLE_PROCESS,
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
    stage = prepare_stage(options, run, device, memory, force, world)
    progress = train(stage, run, stage.config(), callbacks=callbacks, world=world)
    if world.rank == 0:
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
    world: World = SINGLE_PROCESS,
) -> DecoderStage:
    """Read captions and features, open the run folder, and build the decoder.

    See ``train_decoder``. Of the captions' text only that of val is kept.
    """
    cache = FeatureCache(Path(options.features))
    source = open_source(options.data)
    captions_file = Path(options.captions) if options.captions else None
    table, names = load_table(source, captions_file, cache.names(DONE))
    train_captions = tokenized(table.of_split("train"), options.tokenizer)
    val_captions = tokenized(table.of_split("val"), options.tokenizer)
    for split, images in (("train", train_captions), ("val", val_captions)):
        if not images:
            raise UserError(f"{table.source}: no image with features is in the {split} split")
    last = run / "last.pt"
    force = force and not world.restarted
    saved = world.broadcast(lambda: load_checkpoint(last) if last.is_file() and not force else None)
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
    open_run(run, {**asdict(options), **splits}, force, world)
    features = FeatureSet(cache, train_rows, memory)
    val_features = FeatureSet(cache, val_rows, memory - features.size)
    decoder = build_decoder(options, len(vocabulary))
    if saved is not None:
        decoder.load_state_dict(saved.decoder_weights)
    else:
        decoder.set_feature_statistics(*feature_statistics(features))
    captions = encode_captions(train_captions.values(), vocabulary)
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    echo(
        f"{len(captions):,} training captions, {len(vocabulary):,} words in the vocabulary, "
        f"{weights:,} weights, {options.precision} on {device.type}",
        err=True,
    )
    validator = Validator(val_captions, vocabulary)
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
        world=world,
    )
    return stage


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
            init_state_from_image=options.init_state_from_image,
            tie_embeddings=options.tie_embeddings,
        )
    )
