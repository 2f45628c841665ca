"""The command extract_features.py: its messages and exit codes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from click.testing import Result
from commands import invoke
from conftest import draw

import extract_features
from pipeline.features.cache import FeatureCache
from pipeline.models.encoder import Encoder, load_encoder
from pipeline.utils.errors import UserError


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"")


def extract(*words: object, code: int = 0) -> Result:
    options = ("--device", "cpu", "--precision", "fp32")
    return invoke(extract_features.main, *options, *words, code=code)


def refusal(*words: object) -> str:
    """Return the message of a command that must end with exit code 2."""
    result = extract(*words, code=2)
    assert result.stdout == ""
    return result.stderr.partition("Error: ")[2].strip()


def test_no_data_names_both_ways(tmp_path: Path) -> None:
    message = refusal("--data", tmp_path / "missing")
    for words in (str(tmp_path / "missing"), "--download", "Kaggle", "--data FOLDER"):
        assert words in message


def test_a_folder_without_images_is_refused_before_any_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.encoder.load_encoder", None)
    (tmp_path / "notes.txt").touch()
    message = refusal("--data", tmp_path, "--output", tmp_path / "x.h5", "--weights", "random")
    assert message.startswith(f"--data {tmp_path}: no images there; --download downloads")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_network(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, timeout: float) -> None:
        assert timeout == 30.0  # a silent server is given up
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    asked = ("--weights", "imagenet", "--output", tmp_path / "x.h5")
    message = refusal("--data", images, *asked)
    assert len(message.splitlines()) == 1
    for words in ("no network", "--weights FILE", "https://download.pytorch.org/"):
        assert words in message
    assert not list(tmp_path.glob("*.h5*"))


@pytest.mark.parametrize("whole", [False, True])
def test_imagenet_weights_are_downloaded_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    torch.save(Encoder().trunk.state_dict(), tmp_path / "served")
    served = (tmp_path / "served").read_bytes()
    digest = hashlib.sha256(served).hexdigest()[:8] if whole else "0cc3c7bd"
    url = f"https://download.pytorch.org/models/inception_v3_google-{digest}.pth"
    weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_value_", dataclasses.replace(weights.value, url=url))
    answers = iter([io.BytesIO(served)])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: next(answers))
    kept = tmp_path / "hub" / "checkpoints" / Path(url).name
    if not whole:
        with pytest.raises(UserError, match="wrong checksum"):
            load_encoder("imagenet")
        assert not kept.exists()
        return
    assert load_encoder("imagenet").identity == load_encoder("imagenet").identity
    assert kept.read_bytes() == served


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_weights_that_are_none(images: Path, tmp_path: Path) -> None:
    shapes = {
        key: torch.zeros(value.shape, dtype=torch.float16)
        for key, value in Encoder().trunk.state_dict().items()
    }
    key = "Mixed_6c.branch_pool.conv.weight"
    contents: dict[str, tuple[object, str]] = {
        "missing tensor": (
            {k: v for k, v in shapes.items() if k != key},
            f"{key!r} of the InceptionV3 state dict is missing",
        ),
        "shape": (
            {**shapes, key: torch.zeros(2, 3)},
            f"{key} of the InceptionV3 state dict does not have the shape (192, 768,",
        ),
        "unknown": (
            {**shapes, "layer9.weight": torch.zeros(2)},
            "'layer9.weight' of the InceptionV3",
        ),
        "numbers": ({"epoch": 3}, "of the InceptionV3 state dict is missing"),
        "list": ([torch.zeros(2)], "holds no InceptionV3 weights"),
        "bomb": ({**shapes, key: Bomb(tmp_path / "exploded")}, "not a PyTorch file of tensors"),
    }
    for name, (content, words) in contents.items():
        path = tmp_path / name
        torch.save(content, path)
        message = refusal("--data", images, "--output", tmp_path / "x.h5", "--weights", path)
        assert words in message
        assert str(path) in message
        assert len(message.splitlines()) == 1
    (tmp_path / "text").write_text("no weights")
    assert "not a PyTorch file of tensors" in refusal(
        "--data", images, "--weights", tmp_path / "text"
    )
    message = refusal("--data", images, "--weights", tmp_path / "gone.pth")
    assert "gone.pth: no such file (use imagenet, pretrained" in message
    assert not (tmp_path / "exploded").exists()
    assert not list(tmp_path.glob("*.h5*"))


@pytest.mark.usefixtures("tiny_inception")
def test_broken_images_are_named_at_the_end(tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "x.h5"
    draw(data / "good.png")
    spoil(draw(data / "sub" / "bad.png"))
    options = ("--data", data, "--output", output, "--weights", "random")
    result = extract(*options, code=1)
    assert result.stdout == ""
    assert "x.h5: complete, 1 image (1 encoded now, 0 before; fp32, torch)" in result.stderr
    assert "failed: sub/bad.png: empty file" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("1 could not be read; --retry-failed")

    again = extract(*options, code=1)
    assert "x.h5: complete, 1 image (0 encoded now, 1 before; fp32, torch)" in again.stderr
    draw(data / "sub" / "bad.png", 1)
    mended = extract(*options)
    assert "images that have changed, to be encoded again: 1\n" in mended.stderr
    assert "complete, 2 images (" in mended.stderr
    assert "failed" not in mended.stderr

    spoil(data / "good.png")
    stopped = extract(*options, "--force", "--on-error", "fail", code=1)
    assert "good.png: empty file (--on-error skip" in stopped.stderr
    assert FeatureCache(output).complete  # the old one is still there


@pytest.mark.usefixtures("tiny_inception")
@pytest.mark.parametrize(("precision", "engine"), [("bf16", "torch"), ("int8", "openvino")])
def test_a_cache_keeps_the_precision_that_it_was_begun_with(
    images: Path, tmp_path: Path, precision: str, engine: str
) -> None:
    """Begun on a machine with bf16, it goes on so on one that would choose fp32."""
    if engine == "openvino":
        pytest.importorskip("openvino")
    options = ("--data", images, "--output", tmp_path / "x.h5", "--weights", "random")
    extract(*options, "--precision", precision)
    draw(images / "more.png", 20)
    message = refusal(*options, "--precision", "fp32")
    assert f"begun with --precision {precision}, not fp32" in message
    assert f"{precision}, {engine})" in extract(*options, "--precision", "auto").stderr


def test_int8_is_refused_of_pytorch_before_any_weights_are_loaded(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.encoder.load_encoder", None)
    options = ("--data", images, "--output", tmp_path / "x.h5", "--precision", "int8")
    message = refusal(*options, "--engine", "torch")
    assert message.startswith("--precision int8: needs OpenVINO: --engine openvino")
