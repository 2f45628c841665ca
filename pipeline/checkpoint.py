"""What a checkpoint holds and how it is saved: one file that captions by itself.

A checkpoint carries the decoder's weights and sizes, the vocabulary, training pictures to compare
with, the identity of the encoder (after stage 3 its weights too), the settings of the run, its
epoch and scores; ``last.pt`` also what is needed to go on training. It is loaded with
``weights_only=True``, which runs no code from the file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.consensus import Consensus, Neighbours
from pipeline.decoder import Decoder, DecoderConfig
from pipeline.errors import UserError
from pipeline.features import EncoderIdentity
from pipeline.files import atomic_write
from pipeline.vocabulary import Vocabulary

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
        neighbours: training pictures that ``consensus`` compares with, or None.
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
    epoch: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    def build_decoder(self) -> Decoder:
        """Make the decoder, in eval mode, on the CPU."""
        decoder = Decoder(self.decoder_config)
        decoder.load_state_dict(self.decoder_weights)
        return decoder.eval()

    def build_consensus(self) -> Consensus | None:
        """Make what ranks captions by similar training pictures, if the model has any."""
        return Consensus(self.neighbours) if self.neighbours is not None else None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to a temporary file and move it to ``path``."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "decoder_config": asdict(checkpoint.decoder_config),
        "decoder_weights": checkpoint.decoder_weights,
        "vocabulary": checkpoint.vocabulary.to_list(),
        "encoder": asdict(checkpoint.encoder),
        "encoder_weights": checkpoint.encoder_weights,
        "neighbours": checkpoint.neighbours.to_tensors() if checkpoint.neighbours else None,
        "epoch": checkpoint.epoch,
        "scores": checkpoint.scores,
        "settings": checkpoint.settings,
        "training": checkpoint.training,
    }
    with atomic_write(path, "wb") as handle:
        torch.save(content, handle)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Args:
        path: the file, or a run folder, whose ``best.pt`` is taken.

    Raises:
        UserError: no such file, or not a checkpoint of this program and schema version.
    """
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with train_decoder.py")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint that torch can read") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: not a captioner's checkpoint of schema version {SCHEMA_VERSION}; "
            "train again with this version of the program"
        )
    try:
        neighbours = content.get("neighbours")  # older checkpoints have none
        checkpoint = Checkpoint(
            decoder_config=DecoderConfig(**content["decoder_config"]),
            decoder_weights=content["decoder_weights"],
            vocabulary=Vocabulary.from_list(content["vocabulary"]),
            encoder=EncoderIdentity(**content["encoder"]),
            encoder_weights=content["encoder_weights"],
            neighbours=Neighbours.from_tensors(neighbours) if neighbours else None,
            epoch=content["epoch"],
            scores=content["scores"],
            settings=content["settings"],
            training=content["training"],
        )
        if len(checkpoint.vocabulary) != checkpoint.decoder_config.vocabulary_size:
            raise ValueError("vocabulary and decoder differ in size")
        kept = checkpoint.neighbours
        if kept is not None and len(kept.mean) != checkpoint.decoder_config.embed_size:
            raise ValueError("neighbours and decoder differ in size")
        checkpoint.build_decoder()
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error})") from error
    return checkpoint
