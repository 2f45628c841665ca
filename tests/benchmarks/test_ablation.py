"""The ablation table: every row is trained and scored once, and a second run does nothing."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ablation
import pytest
from click.testing import CliRunner
from small_data import make_small_data


def run_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Stand in for ``subprocess.run``: run a script of this project in this process."""
    script = importlib.import_module(Path(command[1]).stem)
    result = CliRunner().invoke(script.main, [*command[2:], "--device", "cpu"])
    if "stdout" in options:
        options["stdout"].write(result.output)
    return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)


def test_the_table_has_every_row_and_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = "--beam-size 1 --no-java"
    small = "--embed-size 8 --hidden-size 8 --batch-size 16 --min-count 1"
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(ablation, "SEARCHED", "recipe")
    monkeypatch.setattr(ablation, "VARIANTS", {"recipe": small})
    monkeypatch.setattr(ablation, "PLAIN", greedy)  # its scores are made once
    monkeypatch.setattr(ablation, "SEARCHES", {"greedy": greedy})
    monkeypatch.setattr(ablation, "ENSEMBLES", {"both seeds, greedy": greedy})
    data, features = make_small_data(tmp_path)
    output = tmp_path / "ablation.md"
    how = "--epochs 1 --seeds 2 --precision fp32"
    words = f"--data {data} --features {features} --runs {tmp_path / 'runs'} {how} --jobs 1"
    options = [*words.split(), "--output", str(output)]
    result = CliRunner().invoke(ablation.main, options)
    assert result.exit_code == 0, result.output
    text = output.read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    named = ["| recipe", "| greedy", "| both seeds, greedy"]
    assert [row for row in rows if row != "|"] == named
    assert f"`{ablation.ENSEMBLE}` `{greedy}`" in text and " ± " in text and f"{how}`" in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=never))
    assert CliRunner().invoke(ablation.main, options).exit_code == 0
    assert output.read_text() == text


def test_a_training_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run_here))
    words = f"--data {tmp_path} --features {tmp_path / 'none.h5'} --runs {tmp_path / 'runs'}"
    options = [*words.split(), "--only", "recipe", "--seeds", "2", "--jobs", "1"]
    result = CliRunner().invoke(ablation.main, options)
    assert result.exit_code == 1 and "train_decoder.py failed: see" in result.output
    assert "none.h5" in (tmp_path / "runs" / "recipe-0" / "output.txt").read_text()
