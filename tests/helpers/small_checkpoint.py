"""A whole checkpoint of a few kilobytes, and what is done with one: for tests of spoiled ones."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from small_data import IDENTITY

from pipeline.datasets.encoded_captions import encode_captions
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import captions_of
from pipeline.decoding.options import SearchOptions
from pipeline.decoding.reranking import best_captions, reranker_of
from pipeline.models.checkpoint import Checkpoint, checkpoint_content, load_checkpoint
from pipeline.models.decoder import DecoderConfig
from pipeline.models.ensemble import make_decoder
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.neighbours import Neighbours
from pipeline.utils.errors import UserError

# In a zip file that torch.save makes.
PICKLE, STORAGES = "archive/data.pkl", "archive/data/"

CAPTIONS = [[["a", "red", "kite"], ["a", "kite"]], [["two", "red", "pots"]], [["a", "pot"]]]


def small_content(members: int = 2) -> dict[str, Any]:
    """Give what the file of a small checkpoint holds: decoders and all second opinions."""
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
    width = config.embed_size * members
    directions = torch.nn.functional.normalize(torch.randn(len(CAPTIONS), width), dim=1)
    return checkpoint_content(
        Checkpoint(
            config,
            make_decoder(config).state_dict(),
            words,
            IDENTITY,
            neighbours=Neighbours(
                torch.zeros(width), directions.half(), encode_captions(CAPTIONS, words)
            ),
            matcher=Matcher(MatcherConfig(len(words), size=4, feature_size=5)).eval(),
            epoch=3,
            scores={"CIDEr-D": 40.5, "distinct": 3},
            settings={"data": "data/flickr8k", "captions": None, "lr": 0.001, "start": ["a", "b"]},
        )
    )


def use(path: Path) -> None:
    """Load a checkpoint and caption two images with it; or see it refused in one line."""
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        assert error.message.startswith(f"{path}: "), error.message
        assert len(error.message.splitlines()) == 1, error.message
        assert len(error.message) < len(str(path)) + 400 and error.message.isprintable()
        return
    decoder, reranker = checkpoint.build_decoder(), reranker_of(checkpoint)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, checkpoint.decoder_config.feature_size, generator=generator)
    decoders = checkpoint.decoder_config.members
    config = SearchOptions(max_length=4).resolve(checkpoint.vocabulary, reranker, decoders)
    for found in best_captions(decoder, features, config, reranker):
        assert found
        for caption in captions_of(found, checkpoint.vocabulary):
            assert len(caption.text.splitlines()) == 1
            assert -1e30 < caption.log_probability <= 1e-3


def saved_members(content: Any) -> dict[str, bytes]:
    """Give the members of the zip file that torch.save makes."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(
    path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write such a file again, with checksums that are right."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
