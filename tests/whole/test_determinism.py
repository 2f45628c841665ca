"""The same command with the same seed makes the same files, byte for byte, on one machine's CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from draw_scenes import draw_scenes
from drawn_run import DrawnRun, run
from one_process import TINY_INCEPTION, run_in_one_process

import train_decoder

TIMED = ("log.jsonl", "sessions.jsonl", "report.html")  # these also show how long the work took
SMALL = "--epochs 2 --batch-size 16 --embed-size 32 --hidden-size 32 --self-critical-epochs 1"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in TIMED
    }


@pytest.mark.parametrize(
    ("network", "threads"),
    [
        (TINY_INCEPTION, 2),
        pytest.param("", 2, marks=pytest.mark.slow),
        pytest.param("", 1, marks=pytest.mark.slow),
    ],
    ids=["tiny", "InceptionV3", "InceptionV3-1"],
)
def test_all_stages_are_repeatable(tmp_path: Path, network: str, threads: int) -> None:
    """In processes of their own, with other hashes and another layout of memory."""
    draw_scenes(tmp_path / "scenes", images=10, seed=0)
    data = f"--data {tmp_path / 'scenes'} --device cpu"
    commands = [
        f"extract_features.py {data} --weights random --output scenes.h5",
        f"train_decoder.py {data} --features scenes.h5 --run run --min-count 1 {SMALL}",
        f"finetune_joint.py {data} --start run --run joint --epochs 1 --unfreeze-from Mixed_7c",
    ]
    made = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        ended = run_in_one_process(
            commands,
            folder,
            before=network,
            OMP_NUM_THREADS=str(threads),
            PYTHONHASHSEED="random",
        )
        assert ended.returncode == 0, ended.stderr
        made.append(digests(folder))
    assert len(made[0]) > 10
    assert made[0] == made[1]


@pytest.mark.usefixtures("tiny_inception")
def test_another_seed_makes_another_model(drawn_run: DrawnRun, tmp_path: Path) -> None:
    made = []
    for seed in (5, 6):
        run(
            train_decoder.main,
            f"--data {drawn_run.data} --features {drawn_run.features} --seed {seed} "
            f"--run {tmp_path / str(seed)} {SMALL}",
        )
        made.append(digests(tmp_path / str(seed)))
    models = [name for name in made[0] if name.startswith(("best", "last", "resume"))]
    assert models and made[0].keys() == made[1].keys()
    assert all(made[0][name] != made[1][name] for name in models)
