"""Stage 2: train the decoder on cached features."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.datasets.encoded_captions import (
    EncodedCaptions,
    bucketed_batches,
    count_batches,
    encode_captions,
    load_table,
)
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.vocabulary import SPECIALS, Vocabulary
from pipeline.features.cache import DONE, FeatureCache
from pipeline.features.feature_set import FeatureSet, feature_statistics, rows_of
from pipeline.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.ngram_predictor import (
    NgramTargets,
    fit_predictor,
    ngram_targets,
    sampled_images,
)
from pipeline.models.pretrained import BEST, LAST
from pipeline.training.loop import Progress, train
from pipeline.training.matcher_training import train_matcher
from pipeline.training.options import DecoderOptions
from pipeline.training.run_folder import can_resume, open_run, refuse_other_features, split_hashes
from pipeline.training.self_critical import SAMPLES, SelfCritical
from pipeline.training.stage import SEED_STRIDE, EpochCallback, Phase, Stage
from pipeline.training.validation import Validation, Validator, split_captions
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.terminal import echo


@dataclass
class FeatureBatch:
    """Images with one caption each, or with none in self-critical epochs."""

    features: Tensor  # float (B, 2048)
    images: Tensor  # int64 (B,): image numbers
    captions: Tensor | None = None  # int64 (B, T), padded


@dataclass
class DecoderStage(Stage):
    """The decoder with its captions and features."""

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

    def parameter_groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        """Return all weights in one group."""
        return [(self.decoder.parameters(), self.options.lr)]

    def phases(self) -> Sequence[Phase]:
        """Return epochs of cross-entropy, then self-critical ones."""
        options = self.options
        tokens = int((self.captions.lengths - 1).sum())  # all but <start> are predicted
        return (
            Phase(
                options.epochs - options.self_critical_epochs,
                tokens_per_batch=tokens / self.batches_per_epoch(1),
            ),
            Phase(options.self_critical_epochs, lr_scale=options.self_critical_lr / options.lr),
        )

    def is_self_critical(self, epoch: int) -> bool:
        """True if an epoch, counted from 1, learns from sampled captions."""
        return epoch > self.options.epochs - self.options.self_critical_epochs

    @property
    def images_per_batch(self) -> int:
        """Number of images whose sampled captions form a batch."""
        return max(1, self.options.batch_size // SAMPLES)

    def batches_per_epoch(self, epoch: int) -> int:
        """Count the batches of captions, or of images to sample captions for."""
        if self.is_self_critical(epoch):
            return -(-len(self.features) // self.images_per_batch)
        return count_batches(len(self.captions), self.options.batch_size)

    def batches(self, epoch: int) -> Iterator[FeatureBatch | None]:
        """Yield this process's share of shuffled captions of similar length, or of images."""
        generator = torch.Generator().manual_seed(self.options.seed * SEED_STRIDE + epoch)
        critical = self.is_self_critical(epoch)
        groups: Iterable[Tensor]
        if critical:
            self.self_critical.reset()
            order = torch.randperm(len(self.features), generator=generator)
            groups = order.split(self.images_per_batch)
        else:
            lengths, size = self.captions.lengths, self.options.batch_size
            groups = bucketed_batches(lengths, size, generator)
        for indices in map(self.world.share, groups):
            if not len(indices):
                yield None
                continue
            images = indices if critical else self.captions.images[indices]
            captions = None if critical else self.captions.padded(indices)
            yield FeatureBatch(self.features[images], images, captions)

    @functools.cached_property
    def self_critical(self) -> SelfCritical:
        """The loss of self-critical epochs, created when the first one begins."""
        return SelfCritical(self.captions, self.options.cross_entropy_weight, self.validator.search)

    def loss(self, batch: FeatureBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy of a batch of captions, or the self-critical loss of images."""
        features = batch.features.to(self.device, non_blocking=True)
        smoothing = self.options.label_smoothing
        if batch.captions is None:
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
        """Return the current weights, with an n-gram predictor for reranking."""
        kept, targets = self._ngrams
        features = (self.features[images] for images in kept.split(4096))
        predictor = fit_predictor(self.decoder, features, targets)
        return self._checkpoint(epoch, scores, self.encoder, predictor=predictor)

    @functools.cached_property
    def _ngrams(self) -> tuple[Tensor, NgramTargets]:
        """The images that an n-gram predictor trains on, and its targets."""
        kept = sampled_images(len(self.features))
        return kept, ngram_targets(self.captions.of_images(kept))


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
        callbacks: see ``loop.train``.
        world: the processes that train together; each must call this.

    Raises:
        UserError: captions or features are missing, do not match, or leave train or val empty; the
            existing run has other settings.
    """
    stage = prepare_stage(options, run, device, memory, force, world)
    progress = train(stage, run, callbacks=callbacks)
    if world.rank == 0:
        _add_matcher(stage, run)
    return progress


def _add_matcher(stage: DecoderStage, run: Path) -> None:
    """Train the matcher of a finished run, and save it in the best checkpoint."""
    best = load_checkpoint(run)
    if best.matcher is None:
        seed = stage.options.seed
        best.matcher = train_matcher(stage.features, stage.captions, stage.decoder, seed)
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

    Arguments and errors are the same as for ``train_decoder``.
    """
    cache = FeatureCache(Path(options.features))
    source = open_source(options.data)
    table, names = load_table(source, options.captions, cache.names(DONE), options.encoding)
    train_captions, val_captions = split_captions(table, options.tokenizer, "image with features")
    resumed = world.broadcast(lambda: can_resume(run, force))
    saved = world.broadcast(lambda: load_checkpoint(run / LAST) if resumed else None)
    if saved is not None:
        refuse_other_features(run, saved, cache)
        vocabulary = saved.vocabulary
    else:
        words = (words for group in train_captions.values() for words in group)
        vocabulary = Vocabulary.build(words, options.min_count, options.tokenizer)
    train_rows = rows_of(cache, [names[name] for name in train_captions])
    val_rows = rows_of(cache, [names[name] for name in val_captions])
    open_run(run, {**asdict(options), **split_hashes(table)}, force, world)
    features = FeatureSet(cache, train_rows, memory)
    decoder = build_decoder(options, len(vocabulary))
    if saved is not None:
        decoder.load_state_dict(saved.decoder_weights)
    else:
        decoder.set_feature_statistics(*feature_statistics(features))
    stage = DecoderStage(
        decoder=decoder.to(device),
        vocabulary=vocabulary,
        encoder=cache.identity,
        features=features,
        captions=encode_captions(train_captions.values(), vocabulary),
        validator=Validator(val_captions, vocabulary),
        val_features=FeatureSet(cache, val_rows, memory - features.size),
        options=options,
        device=device,
        world=world,
    )
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    echo(
        f"{len(stage.captions):,} training captions, {len(vocabulary) - len(SPECIALS):,} words in "
        f"the vocabulary, {weights:,} weights, {options.precision} on {device.type}",
        err=True,
    )
    return stage


def build_decoder(options: DecoderOptions, vocabulary_size: int) -> Decoder:
    """Create an untrained decoder with seeded random weights."""
    torch.manual_seed(options.seed)
    # Options that describe the network have the names of DecoderConfig's fields.
    names = [field.name for field in fields(DecoderConfig) if hasattr(options, field.name)]
    sizes = {name: getattr(options, name) for name in names}
    return Decoder(DecoderConfig(vocabulary_size=vocabulary_size, **sizes))
