"""Training and captioning on disks that are full, read-only or gone."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from commands import invoke
from faults import files_at_most, read_only
from small_data import make_small_data
from test_training import arguments

import train_decoder as command
from pipeline.features.feature_set import FeatureSet
from pipeline.models.checkpoint import load_checkpoint
from pipeline.training.decoder_stage import DecoderStage

EPOCHS = ("--epochs", "3", "--self-critical-epochs", "1")
RESULTS = (
    "best.safetensors",
    "last.safetensors",
    "predictions.json",
    "samples.jsonl",
    "config.json",
    "resume.safetensors",
    "scores.json",
    "curves.svg",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models so small more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    folder.chmod(0o755)  # for ``read_only``
    return make_small_data(folder, images=20)


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed training makes; it also imports all that there is to be imported."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(data, run)
    return contents(run)


def train(data: tuple[Path, Path], run: Path, *more: str, code: int = 0) -> Result:
    return invoke(command.main, *arguments(*data, run, *EPOCHS, *more), code=code)


def refusal(data: tuple[Path, Path], run: Path) -> str:
    """Give the one line of an error, which must be of exit code 2."""
    result = train(data, run, code=2)
    assert isinstance(result.exception, SystemExit), result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: "), result.stderr
    return lines[-1]


def contents(run: Path) -> dict[str, Any]:
    return {name: (run / name).read_bytes() for name in RESULTS}


def before_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, fault: Callable[[], object]) -> None:
    """Have something happen when the data loader begins with an epoch."""
    batches = DecoderStage.batches

    def disturbed(self: DecoderStage, number: int) -> Iterator[Any]:
        if number == epoch:
            fault()
        return batches(self, number)

    monkeypatch.setattr(DecoderStage, "batches", disturbed)


# Disks that are full


@pytest.mark.parametrize("size", [0, 3000, 100_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_space(
    data: tuple[Path, Path], whole: dict[str, Any], tmp_path: Path, size: int
) -> None:
    """Whichever file is the first to be too large: the settings, a page, a checkpoint."""
    run = tmp_path / "run"
    with files_at_most(size):
        assert ": cannot be written (" in refusal(data, run)
    for path in run.rglob("*"):
        assert path.name.startswith(".") is False and ".tmp" not in path.name
    assert (
        not (run / "last.safetensors").exists() or load_checkpoint(run / "last.safetensors").epoch
    )
    train(data, run)
    assert contents(run) == whole


def test_a_disk_that_fills_amid_a_training_leaves_the_last_epoch(
    data: tuple[Path, Path], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        before_epoch(patch, 3, lambda: stack.enter_context(files_at_most(1000)))
        assert ": cannot be written (" in refusal(data, run)
    assert load_checkpoint(run / "last.safetensors").epoch == 2
    assert "resuming after epoch 2" in train(data, run).stderr
    assert contents(run) == whole


# Folders that cannot be written, or go away


def test_a_read_only_folder(data: tuple[Path, Path], whole: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with read_only(run):
        assert "config.json: cannot be written (Permission denied)" in refusal(data, run)
    assert list(run.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        before_epoch(patch, 2, lambda: stack.enter_context(read_only(run)))
        assert ": cannot be written (Permission denied)" in refusal(data, run)
    assert load_checkpoint(run / "last.safetensors").epoch == 1
    train(data, run)
    assert contents(run) == whole
    with read_only(run):
        assert ": cannot be removed (" in train(data, run, "--force", code=2).stderr
    assert contents(run) == whole


def test_a_run_folder_that_is_deleted_and_a_loader_that_dies(
    data: tuple[Path, Path], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_epoch(patch, 2, lambda: shutil.rmtree(run))
        assert f"{run}: is gone; the same command starts the run anew" in refusal(data, run)
    assert not run.exists()

    def die() -> None:
        raise RuntimeError("a fault of the memory")

    with pytest.MonkeyPatch.context() as patch:
        before_epoch(patch, 3, die)
        train(data, run, code=1)
    assert load_checkpoint(run / "last.safetensors").epoch == 2
    train(data, run)
    assert contents(run) == whole


def test_features_that_go_away_and_are_not_in_memory(
    data: tuple[Path, Path], whole: dict[str, Any], tmp_path: Path
) -> None:
    run, away = tmp_path / "run", tmp_path / "away.h5"
    with pytest.MonkeyPatch.context() as patch:
        initialise = FeatureSet.__init__
        patch.setattr(
            FeatureSet,
            "__init__",
            lambda self, cache, rows, memory: initialise(self, cache, rows, 0),
        )
        before_epoch(patch, 2, lambda: data[1].rename(away))
        assert f"{data[1]}: can no longer be opened (No such file or directory)" in refusal(
            data, run
        )
    away.rename(data[1])
    assert load_checkpoint(run / "last.safetensors").epoch == 1
    train(data, run)
    assert contents(run) == whole


def test_a_last_step_that_breaks_the_weights_is_one_line(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """The loss of the only batch is still a number; val is not."""
    options = "--epochs 1 --batch-size 512 --lr 1e30".split()
    result = invoke(command.main, *arguments(*data, tmp_path / "run", *options), code=2)
    assert "the loss on val is nan after epoch 1; a lower learning rate" in result.stderr
