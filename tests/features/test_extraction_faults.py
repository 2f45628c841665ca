"""Extraction on disks that are full, read-only or gone, and with workers that fail."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import StubEncoder, draw
from faults import files_at_most, read_only, small_disk
from stub_extraction import stub_extract

from pipeline.features.cache import FeatureCache, partial_path
from pipeline.utils.errors import UserError


class DisturbedEncoder(StubEncoder):
    """Has something happen before its second batch."""

    def __init__(self, fault: Callable[[], object]) -> None:
        super().__init__()
        self.fault = fault

    def encode(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        if len(self.batches) == 1:
            self.fault()
        return super().encode(images)


run = functools.partial(stub_extract, batch_size=2)


def refusal(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> bytes:
    """What an undisturbed extraction of ``images`` makes."""
    content = run(images, tmp_path / "whole.h5").cache.path.read_bytes()
    (tmp_path / "whole.h5").unlink()
    return content


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Disks that are full


@pytest.mark.parametrize("size", [0, 1000, 20_000, 44_000])
def test_without_space_nothing_begins_and_with_space_all_is_made(
    images: Path, whole: bytes, tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with files_at_most(size):
        message = refusal(images, folder / "x.h5")
    assert message.startswith(f"{folder / 'x.h5'}.partial: cannot be written (")
    assert files(folder) == []
    run(images, folder / "x.h5")
    assert (folder / "x.h5").read_bytes() == whole


def test_without_space_for_more_images_the_cache_stays(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.h5"
    before = run(images, output).cache.path.read_bytes()
    draw(images / "more.png", 20)
    with files_at_most(len(before)):
        assert "cannot be written" in refusal(images, output)
    assert files(output.parent) == ["x.h5"] and output.read_bytes() == before
    assert run(images, output).kept == 10


def test_a_disk_of_its_own(images: Path, whole: bytes, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "240k"):
        filler = disk / "filler"
        filler.write_bytes(bytes(200 << 10))
        message = refusal(images, disk / "x.h5")
        assert "cannot be written (No space left on device)" in message
        assert files(disk) == ["filler"]

        def fill() -> None:
            with pytest.raises(OSError, match="No space"), filler.open("wb") as handle:
                handle.write(bytes(240 << 10))

        filler.unlink()
        run(images, disk / "x.h5", DisturbedEncoder(fill))  # its space was taken at the start
        assert (disk / "x.h5").read_bytes() == whole


# Folders that cannot be written, or go away


def test_a_read_only_folder(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    before = run(images, folder / "x.h5").cache.path.read_bytes()
    with read_only(folder):
        assert "cannot be written (" in refusal(images, folder / "y.h5")
        assert run(images, folder / "x.h5").kept == 10  # nothing is to be written
    draw(images / "more.png", 20)
    with read_only(folder):
        message = refusal(images, folder / "x.h5")
    assert "x.h5.partial: cannot be written (" in message and "ermission denied" in message
    assert files(folder) == ["x.h5"] and (folder / "x.h5").read_bytes() == before


def test_a_folder_that_becomes_read_only(images: Path, whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with contextlib.ExitStack() as stack:
        closing = DisturbedEncoder(lambda: stack.enter_context(read_only(folder)))
        message = refusal(images, folder / "x.h5", closing)
    assert message.startswith(f"{folder / 'x.h5'}")
    assert message.endswith(("cannot be written (Permission denied)", "opened (Permission denied)"))
    result = run(images, folder / "x.h5")
    assert result.kept > 0 or os.geteuid() == 0  # for root the fault is at once
    assert (folder / "x.h5").read_bytes() == whole


def test_a_folder_that_is_deleted(images: Path, whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    message = refusal(images, folder / "x.h5", DisturbedEncoder(lambda: shutil.rmtree(folder)))
    assert message.startswith(f"{folder / 'x.h5'}.partial: ")
    assert "is gone" in message or "can no longer be opened" in message
    run(images, folder / "x.h5")
    assert (folder / "x.h5").read_bytes() == whole


@pytest.mark.parametrize("mount_point_stays", [True, False])
def test_images_that_go_away_are_not_taken_for_broken(
    images: Path, whole: bytes, tmp_path: Path, mount_point_stays: bool
) -> None:
    away = tmp_path / "away"

    def unplug() -> None:
        images.rename(away)
        if mount_point_stays:
            images.mkdir()

    message = refusal(images, tmp_path / "x.h5", DisturbedEncoder(unplug))
    assert "its folder is gone or empty; reconnect it and run the same command to resume" in message
    assert not (tmp_path / "x.h5").exists()
    partial = FeatureCache(partial_path(tmp_path / "x.h5"))
    assert partial.failures() == {}
    if mount_point_stays:
        images.rmdir()
    away.rename(images)
    result = run(images, tmp_path / "x.h5")
    assert result.kept >= 2
    assert result.cache.path.read_bytes() == whole


def test_shards_that_go_away(images: Path, tmp_path: Path) -> None:
    shard, away = tmp_path / "shards" / "0.tar", tmp_path / "away.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        archive.add(images, ".")
    data, output = str(tmp_path / "shards" / "*.tar"), tmp_path / "x.h5"
    message = refusal(data, output, DisturbedEncoder(lambda: shard.rename(away)))
    assert "0.tar/" in message and "the same command to resume" in message
    away.rename(shard)
    assert run(data, output).cache.failures() == {}


def test_a_single_image_that_goes_away_does_not_stop_the_rest(images: Path, tmp_path: Path) -> None:
    encoder = DisturbedEncoder(lambda: (images / "8.png").unlink())
    result = run(images, tmp_path / "x.h5", encoder)
    assert result.cache.failures() == {"8.png": "no such file"}
    result = run(images, tmp_path / "x.h5")
    assert result.cache.failures() == {} and len(result.cache) == 9


# Workers that fail


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError("a fault of the GPU"), SystemExit])
def test_a_worker_that_dies_ends_the_run_and_not_what_is_done(
    images: Path, whole: bytes, tmp_path: Path, workers: int, error: Any
) -> None:
    def die() -> None:
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        run(images, tmp_path / "x.h5", DisturbedEncoder(die), workers=workers)
    result = run(images, tmp_path / "x.h5")
    assert result.kept >= 2 or workers > 1
    assert result.cache.path.read_bytes() == whole
