"""Stage 2: train the decoder on cached features."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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
)
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.cache import DONE, FeatureCache
from pipeline.features.feature_set import FeatureSet, feature_statistics, rows_of
from pipeline.models.checkpoint import BEST, LAST, Checkpoint, load_checkpoint, save_checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.neighbours import choose_neighbours, sampled_images
from pipeline.training.loop import Progress, train
from pipeline.training.matcher_training import train_matcher
from pipeline.training.options import DecoderOptions
from pipeline.training.run_folder import RESUME, open_run, split_hashes
from pipeline.training.self_critical import SAMPLES, SelfCritical
from pipeline.training.stage import SEED_STRIDE, EpochCallback, Phase, TrainingConfig
from pipeline.training.validation import Validation, Validator, split_captions
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo


@dataclass
class CaptionBatch:
    """Captions to train on: features (B, 2048) and captions (B, T), padded."""

    features: Tensor
    captions: Tensor


@dataclass
class ImageBatch:
    """Images to sample captions for: features (B, 2048) and numbers of the images (B,)."""

    features: Tensor
    images: Tensor


@dataclass
class DecoderStage:
    """The decoder with its captions and features: a ``loop.Stage``."""

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
        """Epochs of cross-entropy, then self-critical ones."""
        options = self.options
        tokens = int((self.captions.lengths - 1).sum())  # all but <start> are predicted
        phases = (
            Phase(
                options.epochs - options.self_critical_epochs,
                tokens_per_batch=tokens / self.batches_per_epoch(1),
            ),
            Phase(options.self_critical_epochs, lr_scale=options.self_critical_lr / options.lr),
        )
        return TrainingConfig.of(options, phases)

    def is_self_critical(self, epoch: int) -> bool:
        """True if an epoch, counted from 1, learns from sampled captions."""
        return epoch > self.options.epochs - self.options.self_critical_epochs

    @property
    def images_per_batch(self) -> int:
        """Images whose sampled captions make a batch."""
        return max(1, self.options.batch_size // SAMPLES)

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of captions, or of images to sample captions for."""
        if self.is_self_critical(epoch):
            return -(-len(self.features) // self.images_per_batch)
        return count_batches(len(self.captions), self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[CaptionBatch | ImageBatch | None]:
        """Yield this process's share of captions of similar length, or of images, shuffled."""
        generator = torch.Generator().manual_seed(self.options.seed * SEED_STRIDE + epoch)
        if self.is_self_critical(epoch):
            self.self_critical.reset()
            order = torch.randperm(len(self.features), generator=generator)
            for batch in order.split(self.images_per_batch):
                images = self.world.share(batch)
                yield ImageBatch(self.features[images], images) if len(images) else None
            return
        for batch in bucketed_batches(self.captions.lengths, self.options.batch_size, generator):
            indices = self.world.share(batch)
            if not len(indices):
                yield None
                continue
            features = self.features[self.captions.images[indices]]
            yield CaptionBatch(features, self.captions.padded(indices))

    @functools.cached_property
    def self_critical(self) -> SelfCritical:
        """The loss of self-critical epochs, created when the first one begins."""
        return SelfCritical(self.captions, self.options.cross_entropy_weight, self.validator.search)

    def set_training(self, training: bool) -> None:
        """Switch dropout."""
        self.decoder.train(training)

    def loss(self, batch: CaptionBatch | ImageBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy of a batch of captions, or the self-critical loss of images."""
        features = batch.features.to(self.device, non_blocking=True)
        smoothing = self.options.label_smoothing
        if isinstance(batch, ImageBatch):
            return self.self_critical.loss(self.decoder, features, batch.images, smoothing)
        captions = batch.captions.to(self.device, non_blocking=True)
        return self.decoder.loss(features, captions, smoothing)

    def extra_metrics(self) -> dict[str, float]:
        """Return the mean reward, in percent, of the captions sampled in this epoch, if any."""
        if "self_critical" not in vars(self):
            return {}
        critic = self.self_critical
        rewards, sampled = self.world.all_reduce(critic.reward_sum, critic.sampled)
        return {"reward": 100 * rewards / sampled} if sampled else {}

    def validate(self) -> Validation:
        """Return loss, scores and some captions on val."""
        return self.validator.validate(self.decoder, self.val_features, self.world)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Return the current weights, with neighbours for reranking."""
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
    """Train a decoder in the folder ``run``, or resume the training there.

    Args:
        options: the settings of the run.
        run: the run folder.
        device: where to train.
        memory: bytes for features; larger sets are read from the cache batch by batch.
        force: start over, whatever the folder holds.
        callbacks, world: see ``loop.train``.

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
    """Train the matcher of a finished run, and save it in the best checkpoint."""
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
        save_checkpoint(run / BEST, best)


def prepare_stage(
    options: DecoderOptions,
    run: Path,
    device: torch.device,
    memory: float,
    force: bool,
    world: World = SINGLE_PROCESS,
) -> DecoderStage:
    """Read captions and features, open the run folder, and build the decoder.

    Arguments and errors are those of ``train_decoder``.
    """
    cache = FeatureCache(Path(options.features))
    captions_file = Path(options.captions) if options.captions else None
    table, names = load_table(open_source(options.data), captions_file, cache.names(DONE))
    train_captions, val_captions = split_captions(table, options.tokenizer, "image with features")
    force = force and not world.restarted
    resumed = world.broadcast(lambda: (run / RESUME).is_file() and not force)
    saved = world.broadcast(lambda: load_checkpoint(run / LAST) if resumed else None)
    if saved is not None:
        vocabulary = saved.vocabulary
        mismatch = saved.encoder.mismatch(cache.identity)
        if mismatch:
            raise UserError(
                f"{options.features}: not the features that {run} started with ({mismatch})"
            )
    else:
        vocabulary = Vocabulary.build(
            (words for group in train_captions.values() for words in group),
            options.min_count,
            options.tokenizer,
        )
    train_rows = rows_of(cache, [names[name] for name in train_captions])
    val_rows = rows_of(cache, [names[name] for name in val_captions])
    open_run(run, {**asdict(options), **split_hashes(table)}, force, world)
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
    return DecoderStage(
        decoder=decoder.to(device),
        vocabulary=vocabulary,
        encoder=cache.identity,
        features=features,
        captions=captions,
        validator=Validator(val_captions, vocabulary),
        val_features=val_features,
        options=options,
        device=device,
        world=world,
    )


def build_decoder(options: DecoderOptions, vocabulary_size: int) -> Decoder:
    """Create an untrained decoder with weights from the seed."""
    torch.manual_seed(options.seed)
    # Options that describe the network have the names of DecoderConfig's fields.
    names = [field.name for field in fields(DecoderConfig) if hasattr(options, field.name)]
    sizes = {name: getattr(options, name) for name in names}
    return Decoder(DecoderConfig(vocabulary_size=vocabulary_size, **sizes))
