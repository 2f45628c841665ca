"""The same command with the same seed makes the same files, byte for byte, on one machine's CPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from drawn_run import DrawnRun


def run_script(script: str, arguments: list[str], threads: int, folder: Path) -> None:
    """Run a script in a folder, as a process of its own: hashes and memory are laid out anew."""
    command = [sys.executable, str(REPOSITORY / script), *arguments, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "random"}
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_seed_decides_the_run(drawn_run: DrawnRun, tmp_path: Path, threads: int) -> None:
    """Checkpoints, with all that is needed to go on, and captions."""
    made = []
    for name, seed in (("first", "5"), ("second", "5"), ("other", "6")):
        run_script(
            "train_decoder.py",
            f"--data {drawn_run.data} --features {drawn_run.features} --run run "
            f"--seed {seed} --epochs 2 --batch-size 16 --embed-size 32 --hidden-size 32 "
            "--self-critical-epochs 1".split(),
            threads,
            tmp_path / name,
        )
        made.append(digests(tmp_path / name / "run", ("best.pt", "last.pt", "predictions.json")))
    assert made[0] == made[1]
    assert made[0]["best.pt"] != made[2]["best.pt"]


def test_extraction_and_stage_3_are_repeatable(drawn_run: DrawnRun, tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        folder = tmp_path / name
        extraction = f"--data {drawn_run.data} --weights {drawn_run.weights} --output scenes.h5"
        run_script("extract_features.py", extraction.split(), 2, folder)
        tuning = f"--start {drawn_run.run} --data {drawn_run.data} --run joint --epochs 1"
        run_script("finetune_joint.py", [*tuning.split(), "--unfreeze-from", "Mixed_7c"], 2, folder)
        made.append(digests(folder, ("scenes.h5", "joint/best.pt", "joint/last.pt")))
    assert made[0] == made[1]
