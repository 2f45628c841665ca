"""Commands killed and interrupted: the same command then ends as an undisturbed one does."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

if os.name == "nt":
    pytest.skip("Windows has no fork", allow_module_level=True)

import resource

from forked import PATIENCE, ended
from forked_commands import COMMANDS, World, make_world, said

from pipeline.datasets.images import ImageLike
from pipeline.features import cache_writer, encode_images
from pipeline.features.cache import PENDING, FeatureCache, partial_path
from pipeline.models.checkpoint_file import read_tensors
from pipeline.models.pretrained import LAST
from pipeline.outputs.resume import PartialResults, results_path
from pipeline.training import decoder_stage, joint_stage
from pipeline.utils.errors import UserError

TIMES = ("seconds", "validation_seconds")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def commit_at_once() -> None:
    """A kill then finds some rows done and others not, however quick the machine."""
    cache_writer.COMMIT_INTERVAL = -1.0


def assert_whole(folder: Path) -> None:
    """Read every file that has its final name."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.suffix == ".partial":
            continue
        if path.suffix == ".h5":
            cache = FeatureCache(path)
            assert cache.complete and len(cache.damaged_rows()) == 0
        elif path.suffix == ".safetensors":
            # Not by load_checkpoint, which here, outside of the forked process, wants all layers.
            read_tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl":
            content = path.read_text(encoding="utf-8")
            assert content[-1:] in ("", "\n")
            for line in content.splitlines():
                json.loads(line)
        elif path.suffix == ".svg":
            ElementTree.parse(path)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            assert path.suffix == ".html" and path.read_bytes().rstrip().endswith(b"</html>"), path


def contents(folder: Path) -> dict[str, Any]:
    """Give all files of a folder, but for how long things took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            timed = path.suffix == ".html" or path.name == "sessions.jsonl"
            found[name] = None if timed else path.read_bytes()
            if path.name == "log.jsonl":
                lines = [json.loads(line) for line in found[name].splitlines()]
                found[name] = [{k: v for k, v in x.items() if k not in TIMES} for x in lines]
    return found


# Ctrl-C


def slowed(module: Any, function: str) -> Callable[[], None]:
    """Make what puts 0.1 s before each call of a function."""

    def prepare() -> None:
        commit_at_once()
        quick = getattr(module, function)

        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.1)
            return quick(*arguments, **options)

        setattr(module, function, slow)

    return prepare


def rows_done(folder: Path) -> int:
    try:
        return int((FeatureCache(partial_path(folder / "x.h5")).status != PENDING).sum())
    except UserError:
        return 0


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize(
    ("name", "prepare", "has_begun", "kept"),
    [
        (
            "extract",
            slowed(encode_images, "read_square"),
            lambda folder: rows_done(folder) > 3,
            "encoded now, ",
        ),
        (
            "train",
            slowed(decoder_stage.DecoderStage, "loss"),
            lambda folder: (folder / "run/resume.safetensors").is_file(),
            "resuming after epoch ",
        ),
        (
            "finetune",
            slowed(joint_stage, "load_image"),
            lambda folder: "epoch 1/2" in said(folder),
            "resuming after epoch 1",
        ),
        (
            "caption",
            slowed(PartialResults, "append"),
            lambda folder: lines_of(results_path(folder / "x.jsonl")) > 3,
            "were captioned before",
        ),
    ],
    ids=COMMANDS,
)
def test_ctrl_c_stops_within_seconds_and_keeps_what_is_done(
    world: World,
    tmp_path: Path,
    name: str,
    prepare: Callable[[], None],
    has_begun: Callable[[Path], bool],
    kept: str,
) -> None:
    folder = tmp_path / name
    process = world.start(name, folder, prepare)
    deadline = time.monotonic() + PATIENCE
    while not has_begun(folder):
        assert time.monotonic() < deadline and not os.waitpid(process, os.WNOHANG)[0], said(folder)
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    assert ended(process, patience=5.0) == 130
    assert "interrupted; run the same command to resume\n" in said(folder)
    assert "Traceback" not in said(folder) and "Aborted" not in said(folder)
    assert not (folder / "x.h5").exists() and not (folder / "x.jsonl").exists()
    if name == "extract":
        assert rows_done(folder) > 3
    world.run(name, folder)
    assert kept in said(folder) and "(20 encoded now" not in said(folder)
    assert contents(folder) == contents(world.results[name])


# Disks


@pytest.mark.parametrize(
    ("name", "size"), [("extract", 9000), ("train", 99_000), ("finetune", 99_000), ("caption", 300)]
)
def test_a_full_disk_is_one_line_and_with_space_the_same_command_goes_on(
    world: World, tmp_path: Path, name: str, size: int
) -> None:
    folder = tmp_path / name

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    assert ended(world.start(name, folder, fill)) == 2
    last = said(folder).splitlines()[-1]
    assert last.startswith("Error: ") and ": cannot be written (" in last, said(folder)
    assert "Traceback" not in said(folder)
    assert_whole(folder)
    world.run(name, folder)
    assert contents(folder) == contents(world.results[name])


def test_training_images_that_go_away_stop_the_fine_tuning(world: World, tmp_path: Path) -> None:
    folder, scenes, away = tmp_path / "joint", world.folder / "scenes", world.folder / "away"

    def unplug() -> None:
        read, count = joint_stage.load_image, itertools.count()

        def load_image(path: ImageLike, size: int | None = None) -> Image.Image:
            if next(count) == 20:  # in the second of two epochs of 16
                scenes.rename(away)
            return read(path, size)

        joint_stage.load_image = load_image

    assert ended(world.start("finetune", folder, unplug)) == 2
    away.rename(scenes)
    assert "its folder is gone or empty" in said(folder) and "Traceback" not in said(folder)
    assert read_tensors(folder / "joint" / LAST)[1]["epoch"] == 1
    world.run("finetune", folder)
    assert contents(folder) == contents(world.results["finetune"])


# SIGKILL


@pytest.mark.parametrize(
    ("signal_number", "kills"),
    [
        (signal.SIGKILL, 2),
        pytest.param(signal.SIGKILL, 50, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 10, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment_a_command_ends_as_if_undisturbed(
    world: World, tmp_path: Path, name: str, signal_number: int, kills: int
) -> None:
    """Each kill comes at a random moment; a command that ends in spite of it starts anew."""
    random, expected = Random(f"{name} {signal_number}"), contents(world.results[name])
    killed = runs = resumed = 0
    longest = world.seconds[name]  # adapted, as the machine may be busy at times
    while killed < kills:
        folder, runs, killed_before = tmp_path / f"{runs}", runs + 1, killed
        while True:
            process = world.start(name, folder, commit_at_once)
            time.sleep(random.uniform(0.01, longest))
            os.kill(process, signal_number)
            code = ended(process)
            assert code in (0, 130 if signal_number == signal.SIGINT else -signal_number), said(
                folder
            )
            if code == 0:
                longest *= 0.8
                break
            killed += 1
            longest *= 1.1
            if folder.is_dir():
                assert_whole(folder)
        assert contents(folder) == expected, said(folder)
        assert "Traceback" not in said(folder)
        resumed += killed > killed_before
        shutil.rmtree(folder)
    assert resumed
