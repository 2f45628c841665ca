"""A checkpoint: one self-contained captioner file. docs/file-formats.md describes its content.

A run folder has ``best.safetensors`` and ``last.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.datasets.tar_shards import is_elsewhere
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.checkpoint_file import check_state, group_of, read_tensors, write_tensors
from pipeline.models.decoder import DecoderConfig
from pipeline.models.encoder import NAMED_WEIGHTS, Encoder, load_encoder, load_trunk
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.models.ensemble import CaptionDecoder, make_decoder
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.ngram_predictor import NgramPredictor, merge_predictors
from pipeline.models.pretrained import CONFIG, checkpoint_path, is_pretrained
from pipeline.models.quantization import cast, dequantize, quantize
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo

SCHEMA_VERSION = 3
# Sizes are checked against this limit before a network is built.
LARGEST_SIZE = 1 << 20

Sizes = TypeVar("Sizes", DecoderConfig, MatcherConfig)


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        decoder_weights: a state dict, with the mean and scale of the features.
        encoder: which encoder's features the decoder reads.
        encoder_weights: after stage 3 the encoder itself, as a torchvision state dict of
            the trunk; None before.
        predictor: predicts the n-grams of an image's captions for consensus reranking, or None.
        matcher: the image-text matcher, in eval mode, or None.
        epoch: number of epochs trained.
        scores: validation scores of these weights.
        settings: the options of the run, as plain values.
        is_own: True if it ships with the program or is in its run folder. Any other file may
            come from a stranger, and no path that it names is opened.
    """

    decoder_config: DecoderConfig
    decoder_weights: dict[str, Tensor]
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    encoder_weights: dict[str, Tensor] | None = None
    predictor: NgramPredictor | None = None
    matcher: Matcher | None = None
    epoch: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    is_own: bool = True

    def build_decoder(self) -> CaptionDecoder:
        """Build the decoder, in eval mode, on the CPU."""
        decoder = make_decoder(self.decoder_config)
        decoder.load_state_dict(self.decoder_weights)
        return decoder.eval()

    def refuse_other_features(self) -> None:
        """Raise UserError unless the decoder's feature size is that of InceptionV3."""
        if self.decoder_config.feature_size != FEATURE_SIZE:
            raise UserError(
                f"the model reads {self.decoder_config.feature_size:,} features per image, the "
                f"encoder has {FEATURE_SIZE:,}: use another model"
            )


def save_checkpoint(path: Path, checkpoint: Checkpoint, compress: bool = False) -> None:
    """Write a checkpoint to a temporary file and move it to ``path``.

    ``compress`` stores the encoder's filters in 8 bits and all other networks in 16.

    Raises:
        UserError: the file cannot be written.
    """
    matcher, predictor = checkpoint.matcher, checkpoint.predictor
    groups = {
        "decoder": checkpoint.decoder_weights,
        "encoder": checkpoint.encoder_weights or {},
        "encoder_scales": {},
        "matcher": matcher.state_dict() if matcher else {},
        "predictor": predictor.to_tensors() if predictor else {},
    }
    if compress:
        groups["encoder"], groups["encoder_scales"] = quantize(groups["encoder"])
        for name in ("decoder", "matcher"):
            groups[name] = cast(groups[name], torch.float16)
    document = {
        "schema_version": SCHEMA_VERSION,
        "decoder_config": asdict(checkpoint.decoder_config),
        "matcher_config": asdict(matcher.config) if matcher else None,
        "vocabulary": list(checkpoint.vocabulary.words),
        "tokenizer": checkpoint.vocabulary.tokenizer.name,
        "encoder": asdict(checkpoint.encoder),
        "epoch": checkpoint.epoch,
        "scores": checkpoint.scores,
        "settings": checkpoint.settings,
    }
    tensors = {f"{g}.{name}": t for g, weights in groups.items() for name, t in weights.items()}
    write_tensors(path, tensors, document)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file; a run folder, whose best checkpoint is read; or ``pretrained``, for the
            pretrained model, if nothing here has that name.

    Raises:
        UserError: no such file, or not a checkpoint of this program and schema version; or its
            parts do not fit together.
    """
    is_ours = is_pretrained(path)
    path = checkpoint_path(path)
    tensors, document = read_tensors(path)
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: not a checkpoint of schema version {SCHEMA_VERSION}; train again with this "
            "version of the program"
        )
    try:
        checkpoint = _checkpoint(tensors, document)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error})") from error
    return replace(checkpoint, is_own=is_ours or (path.parent / CONFIG).is_file())


def _checkpoint(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> Checkpoint:
    """Build a checkpoint from a file's content; invalid content raises many kinds of errors."""
    config = _sizes(DecoderConfig, document["decoder_config"])
    vocabulary = Vocabulary(document["vocabulary"], document["tokenizer"])
    if len(vocabulary) != config.vocabulary_size:
        raise ValueError("vocabulary and decoder differ in size")
    decoder_weights = group_of(tensors, "decoder")
    if config.members > len(decoder_weights):
        raise ValueError("there are not as many weights as the ensemble has")
    check_state(decoder_weights, _shapes(lambda: make_decoder(config)), "decoder")
    encoder_weights = dequantize(group_of(tensors, "encoder"), group_of(tensors, "encoder_scales"))
    predictor = None
    if stored := group_of(tensors, "predictor"):
        predictor = NgramPredictor.from_tensors(stored)
        if predictor.mean.shape != (config.members, config.embed_size):
            raise ValueError("n-gram predictor and decoder do not fit together")
    matcher = None
    if document["matcher_config"] is not None:
        matcher = _matcher(document["matcher_config"], group_of(tensors, "matcher"), config)
    for name, kind in (("epoch", int), ("scores", dict), ("settings", dict)):
        if not isinstance(document[name], kind):
            raise ValueError(f"{name} is not of the type {kind.__name__}")
    return Checkpoint(
        decoder_config=config,
        decoder_weights=cast(decoder_weights, torch.float32),
        vocabulary=vocabulary,
        encoder=EncoderIdentity(**{k: str(value) for k, value in document["encoder"].items()}),
        encoder_weights=encoder_weights or None,
        predictor=predictor,
        matcher=matcher,
        epoch=document["epoch"],
        scores=document["scores"],
        settings=document["settings"],
    )


def _sizes(kind: type[Sizes], given: Mapping[str, Any]) -> Sizes:
    """Build a network's configuration from JSON; ValueError for impossible values."""
    config = kind(**given)
    for entry in fields(config):
        value = getattr(config, entry.name)
        possible = {
            "int": type(value) is int and 1 <= value <= LARGEST_SIZE,
            "float": type(value) in (int, float) and 0 <= value < 1,
            "bool": type(value) is bool,
        }
        if not possible[str(entry.type)]:
            raise ValueError(f"{entry.name} is {value!r:.60}")
    return config


def _shapes(build: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """Return the shapes of a network's state dict without allocating its weights."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def _matcher(
    given: Mapping[str, Any], weights: Mapping[str, Tensor], config: DecoderConfig
) -> Matcher:
    sizes = _sizes(MatcherConfig, given)
    if (sizes.vocabulary_size, sizes.feature_size) != (config.vocabulary_size, config.feature_size):
        raise ValueError("matcher and decoder differ in size")
    check_state(weights, _shapes(lambda: Matcher(sizes)), "matcher")
    matcher = Matcher(sizes)
    matcher.load_state_dict(weights)  # converts to float32
    return matcher.eval()


def load_ensemble(paths: Sequence[Path]) -> Checkpoint:
    """Read one checkpoint, or several as the checkpoint of an ensemble.

    An ensemble takes the epoch, scores and settings of the first model, adds all ``seeds`` to the
    settings, and takes the first matcher that any model has.

    Args:
        paths: see ``load_checkpoint``; at least one.

    Raises:
        UserError: see ``load_checkpoint``; or the models differ in encoder, tokenizer, vocabulary
            or decoder sizes.
    """
    first, *others = checkpoints = [load_checkpoint(path) for path in paths]
    if not others:
        return first
    for path, other in zip(paths[1:], others, strict=True):
        unlike = first.encoder.mismatch(other.encoder)
        if unlike is not None:
            raise UserError(f"{path}: not of the same encoder as {paths[0]} ({unlike})")
        mine, theirs = first.vocabulary.tokenizer.name, other.vocabulary.tokenizer.name
        if mine != theirs:
            raise UserError(f"{path}: has the tokenizer {theirs}, {paths[0]} has {mine}")
        if other.vocabulary.words != first.vocabulary.words:
            raise UserError(f"{path}: has another vocabulary than {paths[0]}")
        if replace(other.decoder_config, members=1) != replace(first.decoder_config, members=1):
            raise UserError(f"{path}: its decoder has other sizes than that of {paths[0]}")
    members = [part for checkpoint in checkpoints for part in _members(checkpoint)]
    return replace(
        first,
        decoder_config=replace(first.decoder_config, members=len(members)),
        decoder_weights={
            f"members.{number}.{name}": tensor
            for number, part in enumerate(members)
            for name, tensor in part.items()
        },
        predictor=merge_predictors([checkpoint.predictor for checkpoint in checkpoints]),
        settings={**first.settings, "seeds": [c.settings.get("seed") for c in checkpoints]},
        matcher=next((c.matcher for c in checkpoints if c.matcher is not None), None),
    )


def _members(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Return the weights of each of a checkpoint's decoders."""
    weights, count = checkpoint.decoder_weights, checkpoint.decoder_config.members
    if count == 1:
        return [weights]
    return [group_of(weights, f"members.{number}") for number in range(count)]


def encoder_of(checkpoint: Checkpoint, weights: str | None, precision: str) -> Encoder:
    """Build the encoder that a checkpoint's decoder was trained on.

    Raises:
        UserError: its weights are not available or differ from those used in training; or the
            decoder reads features of another width.
    """
    checkpoint.refuse_other_features()
    wanted = checkpoint.encoder
    if checkpoint.encoder_weights is not None:
        if weights is not None:
            echo(f"--weights {weights}: not used, as the model contains its encoder", err=True)
        encoder = Encoder(wanted.weights_source, precision)
        load_trunk(encoder, checkpoint.encoder_weights, "the checkpoint's encoder")
    else:
        source = weights or wanted.weights_source
        readable = checkpoint.is_own and not is_elsewhere(source) and Path(source).is_file()
        if weights is None and source not in NAMED_WEIGHTS and not readable:
            raise UserError(
                f"the model does not contain its encoder, whose weights were {source} in training; "
                "give their file with --weights FILE"
            )
        encoder = load_encoder(source, precision)
    mismatch = wanted.mismatch(encoder.identity)
    if mismatch is not None:
        raise UserError(
            f"--weights {encoder.source}: not the encoder that this model was trained with "
            f"({mismatch}); it was {wanted.weights_source}"
        )
    return encoder
