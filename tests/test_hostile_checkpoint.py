"""Checkpoints and weights from strangers: nothing in them runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import load_checkpoint
from pipeline.encoder import load_encoder
from pipeline.errors import UserError


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "gone off")


def as_zip(path: Path, bomb: Bomb) -> None:
    """As torch.save writes files now."""
    torch.save({"schema_version": 1, "decoder_weights": bomb}, path)


def as_pickle(path: Path, bomb: Bomb) -> None:
    """As torch.save wrote them long ago, or as anything pickles."""
    path.write_bytes(pickle.dumps({"state_dict": bomb}))


def as_legacy(path: Path, bomb: Bomb) -> None:
    torch.save({"state_dict": bomb}, path, _use_new_zipfile_serialization=False)


def as_script(path: Path, bomb: Bomb) -> None:
    """Looks like TorchScript, which older versions of torch ran."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(bomb))
        archive.writestr("x/constants.pkl", pickle.dumps(bomb))
        archive.writestr("x/version", "3\n")


@pytest.mark.filterwarnings("ignore")  # torch's own, of old files and TorchScript
@pytest.mark.parametrize("pack", [as_zip, as_pickle, as_legacy, as_script])
@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_encoder(str(path))])
def test_a_pickle_bomb_does_not_go_off(
    tmp_path: Path, pack: Callable[[Path, Bomb], None], load: Callable[[Path], Any]
) -> None:
    target, path = tmp_path / "mark", tmp_path / "x.pt"
    pack(path, Bomb(target))
    with pytest.raises(UserError, match="that torch can read") as refused:
        load(path)
    assert "\n" not in refused.value.message
    assert not target.exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    as_zip(tmp_path / "x.pt", Bomb(tmp_path / "mark"))
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").read_text() == "gone off"
