"""Two commands at once on one cache, run folder or file of captions: the second is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import pytest
from commands import invoke
from drawn_run import DrawnRun

import caption
import extract_features
import finetune_joint
import train_decoder
from pipeline.utils.files import lock_path, locked

pytestmark = pytest.mark.usefixtures("tiny_inception")


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "options", "held"),
    [
        (extract_features.main, "--data {data} --weights {weights} --output x.h5", "x.h5"),
        (train_decoder.main, "--data {data} --features {features} --run run --epochs 99", "run"),
        (finetune_joint.main, "--start {run} --data {data} --run joint", "joint"),
        (caption.main, "{image} --model {run} --weights {weights} --output x.csv", "x.csv"),
        (caption.main, "{image} --model {run} --weights {weights} --html x.html", "x.html"),
    ],
)
def test_what_another_process_works_on_is_left_alone(
    drawn_run: DrawnRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: click.Command,
    options: str,
    held: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    target, words = Path(held), options.split()
    if held == "run":
        shutil.copytree(drawn_run.run, target)  # one that could be gone on with
        words.append("--force")
    image = next((drawn_run.data / "Images").glob("*.jpg"))
    places = {**vars(drawn_run), "image": image}
    before = contents()
    with locked(target):
        result = invoke(command, *(word.format(**places) for word in words), code=2)
        after = contents()
    after.pop(lock_path(target).name)
    assert f"Error: {target}: another process is at work on it" in result.stderr
    assert after == before
