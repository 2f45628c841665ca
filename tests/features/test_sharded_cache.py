"""Extraction by several processes: shards, one cache over them, going on with other numbers."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy
import pytest
from commands import invoke
from conftest import REPOSITORY, StubEncoder, draw
from stub_extraction import stub_extract
from thread_job import in_threads

import extract_features
from pipeline.datasets.find_images import find_images
from pipeline.features.cache import FeatureCache, partial_path
from pipeline.features.sharded_cache import resume_identity, shard_files, shard_path, shares
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError

run = functools.partial(stub_extract, batch_size=2)


def shared(
    size: int, data: Path, output: Path, encoders: list[StubEncoder] | None = None, **options: Any
) -> list[Any]:
    """Extract by ``size`` threads, each with an encoder of its own."""
    encoders = encoders or [StubEncoder() for _ in range(size)]
    return in_threads(size, lambda world: run(data, output, encoders[world.rank], world, **options))


def assert_same(cache: FeatureCache, other: FeatureCache) -> None:
    assert cache.names() == other.names()
    rows = numpy.arange(len(other))
    assert (cache.read(rows) == other.read(rows)).all()
    assert (cache.read(rows[::-1]) == other.read(rows)[::-1]).all()
    assert (cache.status == other.status).all()
    assert cache.failures() == other.failures()
    assert cache.identity == other.identity
    assert cache.complete
    assert len(cache.damaged_rows()) == 0


@pytest.mark.parametrize("images, batch_size, processes", [(10, 4, 2), (10, 3, 4), (5, 4, 8)])
def test_shares_are_whole_batches(images: int, batch_size: int, processes: int) -> None:
    parts = shares(images, batch_size, processes)
    assert [row for part in parts for row in part] == list(range(images))
    assert all(part.start % batch_size == 0 for part in parts)
    sizes = [-(-len(part) // batch_size) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == min(processes, -(-images // batch_size))


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_shards_equal_one_process(images: Path, tmp_path: Path, processes: int) -> None:
    (images / "3.png").write_bytes(b"")
    alone = run(images, tmp_path / "alone.h5").cache
    results = shared(processes, images, tmp_path / "x.h5")
    for result in results:
        assert (result.encoded, result.kept) == (9, 0)
        assert_same(result.cache, alone)
    before = {path: path.read_bytes() for path in tmp_path.glob("x.h5*")}
    shared(processes, images, tmp_path / "x.h5", force=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("x.h5*")} == before
    count = min(processes, 5)
    shards = [shard_path(tmp_path / "x.h5", number, count) for number in range(count)]
    assert results[0].cache.shards == shards
    assert shard_files(tmp_path / "x.h5") == shards


def test_any_hdf5_reader_sees_one_dataset(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared(2, images, tmp_path / "x.h5")
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("x.h5*"):
        file.rename(tmp_path / "moved" / file.name)
    monkeypatch.chdir("/")
    cache = FeatureCache(tmp_path / "moved" / "x.h5")
    with h5py.File(cache.path) as file:
        assert file["features"].is_virtual
        assert (file["features"][:] == cache.read(numpy.arange(10)).astype("f2")).all()


def test_done_is_not_done_again(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.h5"
    shared(2, images, output)
    before = {path: path.read_bytes() for path in tmp_path.glob("x.h5*")}
    for processes in (2, 3):
        encoders = [StubEncoder() for _ in range(processes)]
        for result in shared(processes, images, output, encoders):
            assert (result.encoded, result.kept) == (0, 10)
        assert all(encoder.batches == [] for encoder in encoders)
    assert run(images, output).kept == 10  # one process finds it complete too
    assert {path: path.read_bytes() for path in tmp_path.glob("x.h5*")} == before


@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_killed_process_costs_only_its_unfinished_part(
    images: Path, tmp_path: Path, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next run may have another number of processes."""
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", 0.0)
    alone = run(images, tmp_path / "alone.h5").cache
    output = tmp_path / "x.h5"
    encoders = [StubEncoder(), StubEncoder(stop_after=1)]
    results = shared(2, images, output, encoders)
    assert isinstance(results[1], KeyboardInterrupt)
    assert isinstance(results[0], UserError)
    assert "another process" in str(results[0])
    assert not output.exists()
    assert resume_identity(output) == alone.identity
    done = sum(sum(encoder.batches) for encoder in encoders)
    encoders = [StubEncoder() for _ in range(then)]
    if then == 1:
        result = run(images, output, encoders[0])
    else:
        result = shared(then, images, output, encoders)[0]
    assert result.kept == done
    assert result.encoded == sum(sum(encoder.batches) for encoder in encoders) == 10 - done
    assert_same(result.cache, alone)
    # What the first two left is gone, what is needed is there.
    assert shard_files(output) == result.cache.shards
    assert len(result.cache.shards) == (then if then > 1 else 0)


def test_a_partial_cache_of_one_process_is_taken_over(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", 0.0)
    alone = run(images, tmp_path / "alone.h5").cache
    output = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt):
        run(images, output, StubEncoder(stop_after=3))
    result = shared(2, images, output)[0]
    assert (result.kept, result.encoded) == (6, 4)
    assert_same(result.cache, alone)
    assert not partial_path(output).exists()


def test_images_added_move_between_shards(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.h5"
    shared(2, images, output)
    for number in range(4):
        draw(images / f"0-{number}.png", 50 + number)
    (images / "9.png").unlink()
    encoders = [StubEncoder(), StubEncoder()]
    result = shared(2, images, output, encoders)[0]
    assert result.encoded == 4
    assert [encoder.batches for encoder in encoders] == [[2, 2], []]
    assert result.cache.names() == find_images(images)
    assert len(result.cache.damaged_rows()) == 0
    assert capsys.readouterr().err.count("features dropped: 1\n") == 1


def test_one_process_replaces_shards(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.h5"
    shared(2, images, output)
    draw(images / "z.png", 20)
    result = run(images, output)
    assert (result.encoded, result.kept) == (1, 10)
    assert result.cache.shards == []
    assert sorted(path.name for path in tmp_path.glob("x.h5*")) == ["x.h5"]
    assert_same(result.cache, run(images, tmp_path / "alone.h5").cache)


def test_damage_in_a_shard_is_made_again(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.h5"
    whole = shared(2, images, output)[0].cache
    before = whole.read(numpy.arange(10))
    shard = shard_path(output, 1, 2)
    with h5py.File(shard) as file:
        offset = file["features"].id.get_offset()
    content = bytearray(shard.read_bytes())
    content[offset + 2 * FEATURE_SIZE * 2 + 5] ^= 0x40  # the shard's third row, of 4 to 9
    shard.write_bytes(content)
    assert FeatureCache(output).damaged_rows().tolist() == [6]
    encoders = [StubEncoder(), StubEncoder()]
    result = shared(2, images, output, encoders)[0]
    assert [encoder.batches for encoder in encoders] == [[], [2]]
    assert (result.cache.read(numpy.arange(10)) == before).all()
    assert len(result.cache.damaged_rows()) == 0


def test_other_encoders_and_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.h5"
    shared(2, images, output)
    others = [StubEncoder(weights="1" * 64) for _ in range(2)]
    refusals = shared(2, images, output, others)
    assert all(isinstance(refusal, UserError) for refusal in refusals)
    expected = r"made by another encoder .*--force makes it anew, --output FILE keeps both"
    assert any(re.search(expected, str(refusal)) for refusal in refusals)
    assert all(encoder.batches == [] for encoder in others)
    forced = shared(2, images, output, others, force=True)[0]
    assert forced.encoded == 10
    folders = [images, tmp_path / "others"]
    draw(folders[1] / "0.png")
    results = in_threads(2, lambda world: run(folders[world.rank], tmp_path / "y.h5", world=world))
    assert any("differ in the images of --data" in str(result) for result in results)


# With torchrun itself


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous needs libuv there")
def test_torchrun_equals_one_process(tmp_path: Path) -> None:
    data, output, alone = (tmp_path / name for name in ("images", "x.h5", "alone.h5"))
    for number in range(6):
        draw(data / f"{number}.png", number)
    (data / "5.png").write_bytes(b"")
    options = f"--data {data} --weights random --device cpu --precision fp32 --output".split()
    ended = subprocess.run(
        [*TORCHRUN, str(REPOSITORY / "extract_features.py"), *options, str(output)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "5 images (5 encoded now, 0 before; fp32, torch)" in ended.stderr, ended.stderr
    assert ended.stderr.count("failed: 5.png: empty file") == 1
    assert ended.returncode == 1
    invoke(extract_features.main, *options, alone, code=1)
    assert_same(FeatureCache(output), FeatureCache(alone))
    assert len(FeatureCache(output).shards) == 2


def test_a_job_that_cannot_be_joined_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    result = invoke(extract_features.main, "--data", images, code=2)
    assert "Error: WORLD_SIZE is set, but" in result.output and "torchrun" in result.output
