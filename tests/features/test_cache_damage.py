"""Bytes of a cache that a disk spoiled: each is noticed, and only what it hit is made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import h5py
import numpy
import pytest
from conftest import StubEncoder, draw
from test_feature_shards import shared

from pipeline.datasets.image_sources import ImageFolder
from pipeline.datasets.images import find_images
from pipeline.features.cache import DONE, PENDING, FeatureCache, partial_path
from pipeline.features.cache_columns import LATER_COLUMNS
from pipeline.features.extraction import Extraction, ExtractionResult, extract
from pipeline.features.hdf5_layout import read_layout
from pipeline.models.encoder import Encoder
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError

IMAGES = 8
BROKEN = "3.png"


def run(data: Path, output: Path, **options: Any) -> tuple[ExtractionResult, int]:
    """Extract image by image; gives the result, and how many were encoded or tried."""
    encoder = StubEncoder()
    task = Extraction(
        ImageFolder(data), find_images(data), output, cast(Encoder, encoder), 1, 1, **options
    )
    result = extract(task)
    return result, len(encoder.batches)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, hundreds of times."""
    monkeypatch.setattr(numpy.memmap, "flush", lambda array: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(IMAGES):
        draw(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "images" / BROKEN).write_bytes(b"")
    return tmp_path / "images"


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> Path:
    return run(images, tmp_path / "whole.h5")[0].cache.path


def spoiled_places(path: Path, random: Random) -> Iterator[tuple[str, int]]:
    """Choose places all over a file, and in each of its parts, however small."""
    layout = read_layout(path)
    spans = {n: (d.offset, d.size) for n, d in layout.datasets.items() if d.offset is not None}
    outside = set(range(path.stat().st_size))
    for start, size in spans.values():
        outside -= set(range(start, start + size))
    for name, (start, size) in spans.items():
        for _ in range(12):
            yield name, start + random.randrange(size)
    for place in random.sample(sorted(outside), 80):
        yield "structure", place


def as_read(path: Path) -> object:
    """Give all that a training reads of a cache."""
    cache = FeatureCache(path)
    names = cache.names(DONE)
    rows = cache.rows(names)
    cache.refuse_damage(cache.damaged_rows(rows))
    return names, cache.read(rows).tobytes(), cache.failures(), cache.identity, cache.data


def test_a_byte_spoiled_anywhere_is_noticed_and_costs_what_it_hit(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    content, expected = whole.read_bytes(), as_read(whole)
    path, random = tmp_path / "x.h5", Random(0)
    refused = mended = 0
    for part, place in spoiled_places(whole, random):
        spoiled = bytearray(content)
        spoiled[place] ^= random.randrange(1, 256)
        path.write_bytes(spoiled)
        try:
            seen = as_read(path)
        except UserError as error:
            seen = None
            assert str(path) in error.message and "\n" not in error.message
        # What nobody reads may be spoiled until the next extraction looks at it.
        assert seen in (None, expected), (part, place)
        if part in ("structure", "layout_crc"):
            assert seen is None, (part, place)
            with pytest.raises(UserError, match=r"--force makes it anew|make it anew.*--force"):
                run(images, path)
            assert path.read_bytes() == spoiled
            refused += 1
            continue
        _, encoded = run(images, path)
        assert path.read_bytes() == content, (part, place)
        assert encoded <= 1, (part, place)
        mended += encoded
    assert refused == 92 and mended > 60
    assert run(images, path, force=True)[1] == IMAGES - 1
    assert path.read_bytes() == content


def test_a_spoiled_byte_of_an_unfinished_cache_costs_a_row_more(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", -1.0)
    path = tmp_path / "x.h5"
    task = Extraction(
        ImageFolder(images),
        find_images(images),
        path,
        cast(Encoder, StubEncoder(stop_after=4)),
        *(1, 1),
    )
    with pytest.raises(KeyboardInterrupt):
        extract(task)
    partial = partial_path(path)
    content, random = partial.read_bytes(), Random(1)
    pending = int((FeatureCache(partial).status == PENDING).sum())
    assert pending == IMAGES - 5
    for part, place in list(spoiled_places(partial, random))[::3]:
        path.unlink(missing_ok=True)
        spoiled = bytearray(content)
        spoiled[place] ^= random.randrange(1, 256)
        partial.write_bytes(spoiled)
        if part in ("structure", "layout_crc"):
            with pytest.raises(UserError, match="--force"):
                run(images, path)
            continue
        assert run(images, path)[1] <= pending + 1, (part, place)
        assert path.read_bytes() == whole.read_bytes(), (part, place)


def test_many_spoiled_rows(images: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    shutil.copy(whole, path)
    with h5py.File(path, "r+") as file:
        place = file["features"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place + 2 * FEATURE_SIZE : place + 10 * FEATURE_SIZE] = os.urandom(8 * FEATURE_SIZE)
    path.write_bytes(content)
    assert FeatureCache(path).damaged_rows().tolist() == [1, 2, 3, 4]
    assert run(images, path)[1] == 3  # and the broken one
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 4000, -1, -4096])
def test_a_cache_cut_off_is_refused_in_a_line(images: Path, whole: Path, size: int) -> None:
    whole.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(UserError, match=r"whole\.h5: not a readable feature cache") as caught:
        run(images, whole)
    assert "\n" not in caught.value.message


def test_more_behind_its_end_is_noticed(images: Path, whole: Path) -> None:
    whole.write_bytes(whole.read_bytes() + b"\0")
    with pytest.raises(UserError, match="outside of its rows are damaged"):
        run(images, whole)


def test_shards_and_what_shows_them_as_one_are_checked(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.h5"
    before = shared(2, images, output)[0].cache
    names, values = before.names(), before.read(numpy.arange(IMAGES))
    files = sorted(tmp_path.glob("x.h5*"))
    assert len(files) == 3
    for file in files:
        content = file.read_bytes()
        for part, place in list(spoiled_places(file, Random(2)))[::6]:
            spoiled = bytearray(content)
            spoiled[place] ^= 0x10
            file.write_bytes(spoiled)
            encoders = [StubEncoder(), StubEncoder()]
            results = shared(2, images, output, encoders)
            if part in ("structure", "layout_crc"):
                assert all(isinstance(result, UserError) for result in results), (file, part, place)
                file.write_bytes(content)
                continue
            encoded = sum(sum(encoder.batches) for encoder in encoders)
            assert encoded <= 2, (file, part, place)  # a batch
            assert results[0].cache.names() == names
            assert (results[0].cache.read(numpy.arange(IMAGES)) == values).all()
            assert len(results[0].cache.damaged_rows()) == 0


# Caches of before


@pytest.fixture
def old(images: Path, tmp_path: Path) -> Path:
    """Make a cache without what came later."""
    path = run(images, tmp_path / "now.h5")[0].cache.path
    with h5py.File(path) as file, h5py.File(tmp_path / "old.h5", "w") as older:
        older.attrs.update(file.attrs)
        for name, values in file.items():
            if name not in LATER_COLUMNS:
                older.create_dataset(name, data=values[:], dtype=values.dtype)
        older["crc"][3] = 0
    return tmp_path / "old.h5"


def test_an_old_cache_is_taken_as_it_is_and_gets_the_rest_with_the_next_image(
    images: Path, old: Path, whole: Path
) -> None:
    assert as_read(old) == as_read(whole)
    content = old.read_bytes()
    draw(images / "5.png", 50)
    assert run(images, old)[1] == 0 and old.read_bytes() == content
    draw(images / "more.png", 60)
    assert run(images, old)[1] == 1
    assert len(FeatureCache(old).damaged_rows()) == 0
    draw(images / "5.png", 51)
    assert run(images, old)[1] == 1
