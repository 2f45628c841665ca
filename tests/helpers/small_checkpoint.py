"""A whole checkpoint of a few kilobytes, and its use: for tests of damaged and foreign files."""

from __future__ import annotations

from pathlib import Path

import torch
from small_data import IDENTITY

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.checkpoint import Checkpoint, load_checkpoint
from pipeline.models.decoder import DecoderConfig
from pipeline.models.ensemble import make_decoder
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.ngram_predictor import NgramPredictor
from pipeline.utils.errors import UserError

CAPTIONS = [[["a", "red", "kite"], ["a", "kite"]], [["two", "red", "pots"]], [["a", "pot"]]]


def small_checkpoint(members: int = 2) -> Checkpoint:
    """Return a checkpoint with a decoder or an ensemble and all rerankers."""
    torch.manual_seed(0)
    words = Vocabulary.build([caption for group in CAPTIONS for caption in group], 1)
    config = DecoderConfig(
        len(words),
        4,
        3,
        feature_size=5,
        init_state_from_image=True,
        tie_embeddings=True,
        members=members,
    )
    size = config.embed_size
    return Checkpoint(
        config,
        make_decoder(config).state_dict(),
        words,
        IDENTITY,
        predictor=NgramPredictor(
            torch.tensor([3, 8, -6]),
            torch.rand(4),
            torch.randn(members, size),
            torch.randn(members * size, 3).half().float(),
            torch.rand(3),
        ),
        matcher=Matcher(MatcherConfig(len(words), size=4, feature_size=5)).eval(),
        epoch=3,
        scores={"CIDEr-D": 40.5, "distinct": 3},
        settings={"data": "data/flickr8k", "captions": None, "lr": 0.001, "start": ["a", "b"]},
    )


def load_or_refuse(path: Path) -> Checkpoint | None:
    """Load a checkpoint, or see it refused in one line that names the file."""
    try:
        return load_checkpoint(path)
    except UserError as error:
        assert error.message.startswith(f"{path}: "), error.message
        assert len(error.message.splitlines()) == 1, error.message
        return None
