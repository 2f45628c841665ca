"""The checkpoint file: what is kept, and that damaged and foreign files are one-line errors."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from same_weights import assert_same_weights
from small_checkpoint import load_or_refuse, small_checkpoint
from torch import Tensor

from pipeline.captioner import Captioner
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.checkpoint_file import DOCUMENT, TYPES, read_tensors, write_tensors
from pipeline.models.encoder import Encoder, load_encoder
from pipeline.utils.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint's file."""
    path = tmp_path_factory.mktemp("saved") / "small.safetensors"
    save_checkpoint(path, small_checkpoint())
    return path


def test_everything_is_kept(saved: Path) -> None:
    wanted, found = small_checkpoint(), load_checkpoint(saved)
    for name in ("decoder_config", "vocabulary", "encoder", "epoch", "scores", "settings"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert wanted.predictor and found.predictor and wanted.matcher and found.matcher
    for mine, theirs in (
        (wanted.decoder_weights, found.decoder_weights),
        (wanted.predictor.to_tensors(), found.predictor.to_tensors()),
        (wanted.matcher.state_dict(), found.matcher.state_dict()),
    ):
        assert_same_weights(mine, theirs)
    assert not found.matcher.training


def test_the_same_content_makes_the_same_bytes_whatever_the_name(
    saved: Path, tmp_path: Path
) -> None:
    again = tmp_path / "small.pt"
    save_checkpoint(again, small_checkpoint())
    assert again.read_bytes() == saved.read_bytes()
    assert load_checkpoint(again).epoch == 3


def test_tied_embeddings_are_stored_once(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        stored = set(file.keys())
    first = "decoder.members.0."
    names = {f"{first}word_embedding.weight", f"{first}projection.weight"}
    assert len(names & stored) == 1
    weights = load_checkpoint(saved).decoder_weights
    tied = [weights[name.removeprefix("decoder.")] for name in names]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_the_file_is_that_of_the_library_and_aligned(tmp_path: Path) -> None:
    """Of every type; safetensors' own writer orders tensors by size of type, too."""
    path = tmp_path / "x.safetensors"
    tensors = {
        **{str(kind): torch.arange(3).to(kind) for kind in reversed(TYPES)},
        "number": torch.tensor(1.5),
        "empty": torch.empty(0, 2),
        "transposed": torch.arange(6).view(2, 3).t(),
    }
    write_tensors(path, tensors, {})
    assert_same_weights(load_file(path), tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_a_full_disk_is_one_line_and_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    path = tmp_path / "best.safetensors"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"best\.safetensors: cannot be written \(No space left"):
        save_checkpoint(path, small_checkpoint())
    assert path.read_bytes() == b"the one before"


# Damaged and foreign files


@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, at: float, byte: int
) -> None:
    content = bytearray(saved.read_bytes())
    content[int(at * len(content))] = byte
    path = tmp_path_factory.mktemp("changed") / "x.safetensors"
    path.write_bytes(content)
    load_or_refuse(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])
    assert load_or_refuse(path) is None


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert load_or_refuse(path) is None


def _without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {k: v for k, v in document.items() if k != key}


def _with(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, key: value}


CONFIG = asdict(small_checkpoint().decoder_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("vocabulary"), "vocabulary"),
        (_without("decoder_config"), "decoder_config"),
        (_with("schema_version", 99), "schema version 3"),
        (_with("decoder_config", {**CONFIG, "hidden_size": 1 << 40}), "hidden_size"),
        (_with("decoder_config", {**CONFIG, "hidden_size": 4}), "shape"),
        (_with("decoder_config", {**CONFIG, "members": 1 << 20}), "as many weights"),
        (_with("decoder_config", {**CONFIG, "dropout": 1.5}), "dropout"),
        (_with("decoder_config", {**CONFIG, "attention": True}), "attention"),
        (_with("vocabulary", ["<pad>", "<start>", "<end>", "<unk>"]), "differ in size"),
        (_with("vocabulary", ["a", "b"]), "must begin with"),
        (_with("tokenizer", "klingon"), "klingon"),
        (_with("matcher_config", {"vocabulary_size": 9, "size": 4, "feature_size": 5}), "matcher"),
        (_with("encoder", {"encoder": "vgg"}), "weights_sha256"),
        (_with("settings", "none"), "settings"),
        (_with("aliases", {"x": "y"}), "y"),
    ],
)
def test_other_documents_are_refused_with_the_reason(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[DOCUMENT])
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {DOCUMENT: json.dumps(change(document))})
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)
    assert load_or_refuse(path) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.members.0.image_embedding.weight", torch.full((4, 5), torch.nan)),
        ("decoder.members.0.image_embedding.weight", torch.zeros(4, 6)),
        ("decoder.members.0.image_embedding.weight", torch.zeros(4, 5, dtype=torch.int32)),
        ("decoder.members.0.unknown", torch.zeros(1)),
        ("matcher.word_weight", torch.zeros(2)),
        ("predictor.mean", torch.zeros(1, 8)),
        ("predictor.idf", torch.zeros(3)),
        ("predictor.weights", torch.zeros(8, 4)),
        ("predictor.keys", torch.tensor([3, 9, 8])),
    ],
)
def test_other_tensors_are_refused(saved: Path, tmp_path: Path, name: str, value: Tensor) -> None:
    tensors, document = read_tensors(saved)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {**tensors, name: value}, document)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        load_checkpoint(path)


def test_a_decoder_of_other_features_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="reads 5 features per image, the encoder has 2,048"):
        Captioner.load(saved)


# PyTorch files


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "gone off")


@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_encoder(str(path))])
@pytest.mark.parametrize("pickled", [False, True])
def test_code_in_a_pytorch_file_does_not_run(
    tmp_path: Path, load: Callable[[Path], Any], pickled: bool
) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    if pickled:
        path.write_bytes(pickle.dumps({"state_dict": Bomb(mark)}))
    else:
        torch.save({"decoder_weights": Bomb(mark)}, path)
    with pytest.raises(UserError, match=r"x\.pt: not a (checkpoint|PyTorch file)") as refused:
        load(path)
    assert "\n" not in refused.value.message and not mark.exists()


@pytest.fixture(scope="module")
def trunk() -> dict[str, Tensor]:
    return Encoder().trunk.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"Conv2d_1a_3x3.conv.weight": None},
        {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 4)},
        {"Conv2d_1a_3x3.conv.weight": torch.full((32, 3, 3, 3), torch.inf)},
        {"Conv2d_1a_3x3.conv.weight": "text"},
        {"two\nlines": torch.zeros(1)},
    ],
    ids=["missing", "shape", "infinite", "text", "unknown"],
)
def test_other_encoder_weights_are_refused_in_one_line(
    tmp_path: Path, trunk: dict[str, Tensor], change: dict[str, Any]
) -> None:
    path = tmp_path / "x.pth"
    torch.save({k: v for k, v in {**trunk, **change}.items() if v is not None}, path)
    with pytest.raises(UserError, match=r"x\.pth: .*InceptionV3 state dict") as refused:
        load_encoder(str(path))
    assert len(refused.value.message.splitlines()) == 1
