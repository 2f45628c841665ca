"""What a checkpoint holds and how it is saved: one file that captions by itself.

A checkpoint carries the decoder's weights and sizes, the vocabulary, training images to compare
with, the identity of the encoder (after stage 3 its weights too), the settings of the run, its
epoch and scores; ``last.pt`` also what is needed to go on training. It is loaded with
``weights_only=True``, which runs no code from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.datasets.tokenizers import ENGLISH, TOKENIZERS
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.checkpoint_checks import (
    check_decoder_weights,
    check_encoder,
    check_matcher,
    check_neighbours,
    check_record,
    check_sizes,
    check_vocabulary,
)
from pipeline.models.decoder import DecoderConfig
from pipeline.models.encoder import (
    NAMED_WEIGHTS,
    Encoder,
    load_encoder,
    load_trunk,
    trunk_shapes,
    trunk_state,
)
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.models.ensemble import CaptionDecoder, make_decoder
from pipeline.models.matcher import Matcher
from pipeline.models.neighbours import Neighbours, merge_neighbours
from pipeline.models.pretrained import is_pretrained, pretrained_path
from pipeline.models.quantization import cast, dequantize
from pipeline.models.torch_files import read_torch_file
from pipeline.models.weight_checks import check_values, short
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, uninterrupted

SCHEMA_VERSION = 1


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        decoder_config: the decoder's sizes.
        decoder_weights: its state dict, feature standardisation included.
        vocabulary: token ids to words.
        encoder: which encoder's features the decoder reads.
        encoder_weights: after stage 3 the encoder itself, as a torchvision state dict of
            the trunk; None before.
        neighbours: training images that ``consensus`` compares with, or None.
        matcher: tells how well a caption fits an image, or None; in eval mode.
        epoch: how many epochs were trained.
        scores: validation scores of these weights.
        settings: the options of the run, as plain values.
        training: optimizer state and bookkeeping to go on from (``last.pt`` alone).
    """

    decoder_config: DecoderConfig
    decoder_weights: dict[str, Tensor]
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    encoder_weights: dict[str, Tensor] | None = None
    neighbours: Neighbours | None = None
    matcher: Matcher | None = None
    epoch: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    def build_decoder(self) -> CaptionDecoder:
        """Make the decoder, in eval mode, on the CPU."""
        decoder = make_decoder(self.decoder_config)
        decoder.load_state_dict(self.decoder_weights)
        return decoder.eval()

    def refuse_other_features(self) -> None:
        """Raise UserError unless the decoder reads as many numbers as InceptionV3 gives."""
        if self.decoder_config.feature_size != FEATURE_SIZE:
            raise UserError(
                f"the model reads {self.decoder_config.feature_size:,} numbers an image, the "
                f"encoder gives {FEATURE_SIZE:,}: take another model"
            )


def checkpoint_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give what a checkpoint's file holds: plain values and tensors, by name."""
    return {
        "schema_version": SCHEMA_VERSION,
        "decoder_config": asdict(checkpoint.decoder_config),
        "decoder_weights": checkpoint.decoder_weights,
        "vocabulary": checkpoint.vocabulary.to_list(),
        "tokenizer": checkpoint.vocabulary.tokenizer.name,
        "encoder": asdict(checkpoint.encoder),
        "encoder_weights": checkpoint.encoder_weights,
        "neighbours": checkpoint.neighbours.to_tensors() if checkpoint.neighbours else None,
        "matcher": _matcher_content(checkpoint.matcher),
        "epoch": checkpoint.epoch,
        "scores": checkpoint.scores,
        "settings": checkpoint.settings,
        "training": checkpoint.training,
    }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to a temporary file and move it to ``path``; see ``write_content``."""
    write_content(path, checkpoint_content(checkpoint))


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write what a checkpoint's file holds.

    Raises:
        UserError: the file cannot be written, as when the disk is full.
    """
    try:
        # torch takes an interruption amid its writing for a full disk.
        with uninterrupted(), atomic_write(path, "wb") as handle:
            torch.save(content, handle)
    except RuntimeError as error:  # torch's word for a write that failed
        raise UserError(f"{path}: cannot be written (is the disk full?)") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Args:
        path: the file; a run folder, whose ``best.pt`` is taken; or ``pretrained``, for the model
            that comes with the program, if nothing here has that name.

    Raises:
        UserError: no such file, or not a checkpoint of this program and schema version; or what
            it holds does not fit together, or is not fit to be computed with.
    """
    if is_pretrained(path):
        path = pretrained_path()
    elif path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with train_decoder.py")
    content = read_torch_file(path, str(path), "a checkpoint")
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: not a captioner's checkpoint of schema version {SCHEMA_VERSION}; "
            "train again with this version of the program"
        )
    tokenizer = content.get("tokenizer", ENGLISH)  # older checkpoints do not say
    if tokenizer not in tuple(TOKENIZERS):
        raise UserError(
            f"{path}: made with the tokenizer {short(tokenizer)}, which this version does not have"
        )
    try:
        return _checked(content, tokenizer)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        reason = error.message if isinstance(error, UserError) else str(error)
        raise UserError(f"{path}: the checkpoint is damaged ({reason})") from error


def _checked(content: dict[str, Any], tokenizer: str) -> Checkpoint:
    """Make a checkpoint of what its file holds, once all of it is known to fit together.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RuntimeError, UserError: it does not.
    """
    # Files of version 0.1.0 name two options otherwise.
    later = {"image_state": "init_state_from_image", "tied": "tie_embeddings"}
    sizes = {later.get(name, name): value for name, value in content["decoder_config"].items()}
    content["decoder_weights"] = {
        name.replace("image_state.", "init_state_from_image.")
        if "init_state_from_image." not in name
        else name: tensor
        for name, tensor in content["decoder_weights"].items()
    }
    config = check_sizes(DecoderConfig, sizes)
    check_vocabulary(content["vocabulary"], config)
    check_decoder_weights(content["decoder_weights"], config)
    decoder_weights = cast(content["decoder_weights"], torch.float32)
    check_values(decoder_weights, "decoder")
    check_record(content)
    encoder_weights = content["encoder_weights"]
    if encoder_weights is not None:
        encoder_weights = trunk_state(
            dequantize(encoder_weights, content.get("encoder_scales", {})), trunk_shapes()
        )
    neighbours = content.get("neighbours")  # older checkpoints have none
    if neighbours is not None:
        check_neighbours(neighbours, config)
    return Checkpoint(
        decoder_config=config,
        decoder_weights=decoder_weights,
        vocabulary=Vocabulary.from_list(content["vocabulary"], tokenizer),
        encoder=check_encoder(content["encoder"]),
        encoder_weights=encoder_weights,
        neighbours=None if neighbours is None else Neighbours.from_tensors(neighbours),
        matcher=_build_matcher(content.get("matcher"), config),
        epoch=content["epoch"],
        scores=content["scores"],
        settings=content["settings"],
        training=content["training"],
    )


def _matcher_content(matcher: Matcher | None) -> dict[str, Any] | None:
    """Give what a checkpoint's file holds of a matcher."""
    if matcher is None:
        return None
    weights = {name: tensor.cpu() for name, tensor in matcher.state_dict().items()}
    return {"config": asdict(matcher.config), "weights": weights}


def _build_matcher(content: Any, config: DecoderConfig) -> Matcher | None:
    if content is None:
        return None
    matcher = Matcher(check_matcher(content, config))
    matcher.load_state_dict(content["weights"])  # brings halves to float32
    return matcher.eval()


def load_ensemble(paths: Sequence[Path]) -> Checkpoint:
    """Read one checkpoint, or several as one whose decoders caption together.

    Of several the epoch, scores, settings and matcher are the first one's, and all ``seeds`` are
    among the settings.

    Args:
        paths: see ``load_checkpoint``; at least one.

    Raises:
        UserError: see ``load_checkpoint``; or the models are not of one encoder, vocabulary and
            recipe, as ``ensemble`` needs them.
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
        if other.vocabulary.to_list() != first.vocabulary.to_list():
            raise UserError(f"{path}: has not the vocabulary of {paths[0]}")
        if replace(other.decoder_config, members=1) != replace(first.decoder_config, members=1):
            raise UserError(f"{path}: its decoder is not of the sizes of that of {paths[0]}")
    members = [part for checkpoint in checkpoints for part in _members(checkpoint)]
    neighbours = [checkpoint.neighbours for checkpoint in checkpoints]
    return replace(
        first,
        decoder_config=replace(first.decoder_config, members=len(members)),
        decoder_weights={
            f"members.{number}.{name}": tensor
            for number, part in enumerate(members)
            for name, tensor in part.items()
        },
        neighbours=merge_neighbours([n for n in neighbours if n is not None])
        if None not in neighbours
        else None,
        settings={**first.settings, "seeds": [c.settings.get("seed") for c in checkpoints]},
        matcher=next((c.matcher for c in checkpoints if c.matcher is not None), None),
        training=None,
    )


def _members(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Give the weights of each of a checkpoint's decoders."""
    count = checkpoint.decoder_config.members
    if count == 1:
        return [checkpoint.decoder_weights]
    return [
        {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint.decoder_weights.items()
            if name.startswith(prefix)
        }
        for prefix in (f"members.{number}." for number in range(count))
    ]


def encoder_of(checkpoint: Checkpoint, weights: str | None, precision: str) -> Encoder:
    """Build the encoder that a checkpoint's decoder was trained on.

    Raises:
        UserError: its weights cannot be had, or are others than those of the training; the
            decoder reads features of another width.
    """
    checkpoint.refuse_other_features()
    wanted = checkpoint.encoder
    if checkpoint.encoder_weights is not None:
        encoder = Encoder(wanted.weights_source, precision)
        load_trunk(encoder, checkpoint.encoder_weights, "the checkpoint's encoder")
    else:
        source = weights or wanted.weights_source
        if weights is None and source not in NAMED_WEIGHTS and not Path(source).is_file():
            raise UserError(
                f"the encoder's weights are no longer at {source}, where they were in training; "
                "say where they are: --weights FILE"
            )
        encoder = load_encoder(source, precision)
    mismatch = wanted.mismatch(encoder.identity)
    if mismatch is not None:
        raise UserError(
            f"--weights {encoder.source}: not the encoder that this model was trained with "
            f"({mismatch}); it was {wanted.weights_source}"
        )
    return encoder
