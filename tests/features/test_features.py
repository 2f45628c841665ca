"""The feature cache: its layout, finding rows, damage, and going on where a run stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import tracemalloc
from pathlib import Path
from random import Random

import h5py
import numpy
import pytest

from pipeline.features.cache import (
    DONE,
    FAILED,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    FeatureCache,
    images_sha256,
    partial_path,
)
from pipeline.features.cache_writer import CacheWriter, open_cache_writer
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.errors import UserError

IDENTITY = EncoderIdentity("inception_v3", "a" * 64, "squeeze-299-bilinear", "fp32", "random", "0")
NAMES = ["a.jpg", "b/c.jpg", "d.jpg", "é 狗.jpg"]


def feature(name: str) -> numpy.ndarray:
    """Give the features that an image of this name has in these tests."""
    generator = numpy.random.default_rng(list(os.fsencode(name)))
    return generator.normal(size=FEATURE_SIZE).astype(numpy.float32)


def writer_of(
    path: Path,
    names: list[str],
    identity: EncoderIdentity = IDENTITY,
    force: bool = False,
    retry_failed: bool = False,
) -> CacheWriter:
    writer = open_cache_writer(path, names, identity, force, retry_failed)
    assert writer is not None
    return writer


def fill(writer: CacheWriter, broken: dict[str, str] | None = None, rows: int = 1 << 30) -> int:
    """Write ``rows`` pending rows, one a batch; returns how many were written."""
    broken, written = broken or {}, 0
    for [row] in writer.pending_batches(1):
        if written == rows:
            break
        name = writer.cache.name(row)
        if name in broken:
            writer.write([], numpy.empty((0, FEATURE_SIZE)), {row: broken[name]})
        else:
            writer.write([row], feature(name)[None], {})
        written += 1
    writer.commit()
    return written


def make(path: Path, names: list[str], broken: dict[str, str] | None = None) -> FeatureCache:
    writer = writer_of(path, names)
    fill(writer, broken)
    return writer.finish()


def assert_holds(cache: FeatureCache, names: list[str]) -> None:
    rows = cache.rows(names)
    assert (rows >= 0).all()
    assert (cache.status[rows] == DONE).all()
    expected = numpy.stack([feature(name).astype(numpy.float16) for name in names])
    assert (cache.read(rows) == expected).all()
    assert len(cache.damaged_rows()) == 0


def spoil(path: Path, dataset: str, row: int) -> None:
    """Change one byte of one row in the file."""
    with h5py.File(path) as file:
        values = file[dataset]
        place = values.id.get_offset() + row * values.dtype.itemsize * int(values[0].size) + 100
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


# Layout


def test_layout_is_what_the_module_says(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.h5"
    make(path, NAMES, {"d.jpg": "empty file"})
    with h5py.File(path) as file:
        layout = {name: (values.shape, values.dtype.str) for name, values in file.items()}
        longest = max(len(name.encode()) for name in NAMES)
        assert layout == {
            "features": ((4, FEATURE_SIZE), "<f2"),
            "names": ((4,), f"|S{longest}"),
            "status": ((4,), "|u1"),
            "reason": ((4,), f"|S{REASON_BYTES}"),
            "crc": ((4,), "<u4"),
            "stamps": ((4, 2), "<i8"),
            "row_crc": ((4,), "<u4"),
            "layout_crc": ((1,), "<u4"),
            "complete": ((1,), "|u1"),
        }
        for values in file.values():
            assert values.chunks is None
            assert values.id.get_create_plist().get_nfilters() == 0
            assert h5py.h5g.get_objinfo(values.id).mtime == 0  # no clock makes the bytes differ
            assert values.id.get_offset() is not None
        assert dict(file.attrs) == {
            **dataclasses.asdict(IDENTITY),
            "schema_version": SCHEMA_VERSION,
            "images_sha256": images_sha256(NAMES),
            "data": "",
        }
        assert list(file["names"].asstr()) == NAMES
        assert list(file["reason"].asstr()) == ["", "", "empty file", ""]
        assert file["status"][:].tolist() == [DONE, DONE, FAILED, DONE]
        assert file["complete"][0] == 1
        assert (file["features"][1] == feature("b/c.jpg").astype("f2")).all()
    assert [found.name for found in path.parent.iterdir()] == ["x.h5"]


def test_rows_are_in_the_order_of_bytes(tmp_path: Path) -> None:
    names = ["b", "B", "a/b", "a b", "a.b", "\U0001f600", "\uffee", "é", "e\u0301", "zz", "z"]
    if os.name == "posix":
        names += [os.fsdecode(b"\xff.jpg"), os.fsdecode(b"\x80"), "line\nend"]
    cache = make(tmp_path / "x.h5", names)
    assert cache.names() == sorted(names, key=os.fsencode)
    assert_holds(cache, names)
    assert [cache.name(row) for row in cache.rows(names)] == names


def test_finding_rows(tmp_path: Path) -> None:
    cache = make(tmp_path / "x.h5", NAMES)
    wanted = ["d.jpg", "", "a.jp", "a.jpg", "a.jpg2", "zzz", "a.jpg", "é 狗.jpg" + "x" * 300]
    assert cache.rows(wanted).tolist() == [2, -1, -1, 0, -1, -1, 0, -1]
    assert cache.rows([]).shape == (0,)
    values = cache.read(cache.rows(["d.jpg", "a.jpg", "d.jpg"]))
    assert values.dtype == numpy.float32
    assert values.shape == (3, FEATURE_SIZE)
    assert (values[0] == values[2]).all()
    assert (values[1] == feature("a.jpg").astype("f2")).all()


def test_long_names(tmp_path: Path) -> None:
    names = ["x" * 200 + "/" + "狗" * number + ".jpg" for number in (1, 70, 71)]
    assert_holds(make(tmp_path / "x.h5", names), names)


def test_a_large_cache_is_mapped_not_loaded(tmp_path: Path) -> None:
    names = [f"images/{number:05d}.jpg" for number in range(20_000)]
    writer = writer_of(tmp_path / "x.h5", names)
    last = len(names) - 1
    writer.write([last], feature(names[last])[None], {})
    writer.finish()
    tracemalloc.start()
    try:
        cache = FeatureCache(tmp_path / "x.h5")
        rows = cache.rows([names[last], "y" * 400, names[7]])
        values = cache.read(rows[:1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.tolist() == [last, -1, 7]
    assert (values[0] == feature(names[last]).astype("f2")).all()
    assert isinstance(cache.features, numpy.memmap)
    assert peak < 200_000  # the names alone are 400,000 bytes, the features 80 million


@pytest.mark.parametrize(
    "reason, kept",
    [
        ("short", "short"),
        ("x" * 400, "x" * REASON_BYTES),
        ("x" + "é" * 100, "x" + "é" * 79),  # the 160th byte is half a letter
        ("狗" * 100, "狗" * 53),
        ("broken \udcff name", "broken ? name"),
    ],
)
def test_reasons_are_cut_between_letters(tmp_path: Path, reason: str, kept: str) -> None:
    cache = make(tmp_path / "x.h5", NAMES, {"a.jpg": reason})
    assert cache.failures() == {"a.jpg": kept}
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["reason"].asstr()[0] == kept
    assert cache.names(FAILED) == ["a.jpg"]
    assert cache.names(DONE) == NAMES[1:]


# Damage


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_rows_are_found_and_made_again(tmp_path: Path, finished: bool) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES)
    whole = path.read_bytes()
    if not finished:
        path.unlink()
        fill(writer_of(path, NAMES))
    found = path if finished else partial_path(path)
    spoil(found, "features", 2)
    cache = FeatureCache(found)
    assert cache.damaged_rows().tolist() == [2]
    assert cache.damaged_rows(numpy.array([0, 3, 2])).tolist() == [2]
    assert cache.damaged_rows(numpy.array([0, 3])).tolist() == []
    writer = writer_of(path, NAMES)
    assert writer.cache.status.tolist() == [DONE, DONE, PENDING, DONE]
    assert fill(writer) == 1
    writer.finish()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
def test_features_that_are_no_numbers_are_damage(tmp_path: Path, value: float) -> None:
    """Their checksums fit, as in a stranger's cache; a search through them finds no caption."""
    writer = writer_of(tmp_path / "x.h5", NAMES)
    for [row] in writer.pending_batches(1):
        features = feature(writer.cache.name(row))[None].copy()
        features[0, 1000] = value if row == 1 else -65504  # the lowest float16
        writer.write([row], features, {})
    writer.finish()
    assert FeatureCache(tmp_path / "x.h5").damaged_rows().tolist() == [1]


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with pytest.raises(UserError, match=r"x\.h5: no such feature cache; make it with"):
        FeatureCache(path)
    whole = make(path, NAMES)
    content = path.read_bytes()
    del whole
    for garbage in (b"", b"garbage", content[: len(content) // 2], bytes(len(content))):
        path.write_bytes(garbage)
        with pytest.raises(UserError, match=r"x\.h5: not a readable feature cache.*--force") as bad:
            FeatureCache(path)
        assert "\n" not in bad.value.message
    with h5py.File(path, "w") as file:
        file["features"] = numpy.zeros((3, FEATURE_SIZE))
    with pytest.raises(UserError, match=r"x\.h5: not a feature cache of schema version 1"):
        FeatureCache(path)
    with h5py.File(path, "w") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        for field in (*dataclasses.asdict(IDENTITY), "images_sha256"):
            file.attrs[field] = "x"
        file.create_group("features")
    with pytest.raises(UserError, match=r"x\.h5: not a readable feature cache"):
        FeatureCache(path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES)
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    for use in (lambda: FeatureCache(path), lambda: writer_of(path, NAMES)):
        with pytest.raises(UserError, match=r"schema version 1; make it anew.*--force"):
            use()
    assert fill(writer_of(path, NAMES, force=True)) == len(NAMES)


def test_a_damaged_header_gives_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES)
    content, random = path.read_bytes(), Random(0)
    refused = 0
    for _ in range(150):
        spoiled = bytearray(content)
        spoiled[random.randrange(4000)] = random.randrange(256)
        path.write_bytes(spoiled)
        try:
            FeatureCache(path)
        except UserError:
            refused += 1
    assert refused > 20


# Going on


def test_partial_until_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    writer = writer_of(path, NAMES)
    assert fill(writer, rows=2) == 2
    assert not path.exists()
    assert not writer.cache.complete
    with pytest.raises(UserError, match=r"x\.h5: the feature cache is not finished; run extract"):
        FeatureCache(path)
    fill(writer)
    cache = writer.finish()
    assert cache.complete
    assert not partial_path(path).exists()
    assert open_cache_writer(path, NAMES, IDENTITY, False, False) is None


def test_resume_keeps_rows(tmp_path: Path) -> None:
    make(tmp_path / "undisturbed.h5", NAMES)
    path = tmp_path / "x.h5"
    fill(writer_of(path, NAMES), rows=3)
    writer = writer_of(path, NAMES)
    assert writer.cache.status.tolist() == [DONE, DONE, DONE, PENDING]
    assert fill(writer) == 1
    writer.finish()
    assert path.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()


def test_rows_are_done_only_once_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_of(tmp_path / "x.h5", NAMES)
    order: list[str] = []
    flush = numpy.memmap.flush

    def spy(array: numpy.memmap) -> None:
        order.append("features" if array.ndim == 2 else "other")
        assert (writer.cache.status == PENDING).all()
        flush(array)

    monkeypatch.setattr(numpy.memmap, "flush", spy)
    assert writer.write([0], feature("a.jpg")[None], {1: "broken"}) == 2
    assert writer.cache.status.tolist() == [PENDING] * 4
    writer.commit()
    assert "features" in order
    assert writer.cache.status.tolist() == [DONE, FAILED, PENDING, PENDING]


def test_commits_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", 0.0)
    writer = writer_of(tmp_path / "x.h5", NAMES)
    writer.write([0], feature("a.jpg")[None], {})
    assert writer.cache.status[0] == DONE


def test_batches_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(8)]
    writer = writer_of(tmp_path / "x.h5", names)
    assert list(writer.pending_batches(3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    fill(writer, rows=4)
    assert list(writer.pending_batches(3)) == [[3, 4, 5], [6, 7]]
    assert writer.write([3], feature("3.jpg")[None], {}) == 0  # made again, not news


def test_a_image_mended_between_two_runs(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "x.h5", NAMES)
    fill(writer, {"a.jpg": "empty file"}, rows=3)
    writer.write([0], feature("a.jpg")[None], {})  # made again with its batch
    fill(writer)
    writer.finish()
    make(tmp_path / "undisturbed.h5", NAMES)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()


def test_images_added_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES, {"d.jpg": "empty file"})
    names = ["0.jpg", "a.jpg", "d.jpg", "x.jpg"]
    writer = writer_of(path, names)
    assert writer.cache.names(PENDING) == ["0.jpg", "x.jpg"]
    assert path.exists()  # the old one stays until the new one is complete
    assert fill(writer, rows=1) == 1
    names.append("y" * 300)
    writer = writer_of(path, names)  # and again, from the partial one
    assert writer.cache.names(PENDING) == ["x.jpg", "y" * 300]
    assert fill(writer) == 2
    cache = writer.finish()
    assert cache.names() == names
    assert cache.failures() == {"d.jpg": "empty file"}
    assert_holds(cache, ["0.jpg", "a.jpg", "x.jpg", "y" * 300])
    assert cache.images_sha256 == images_sha256(names)
    assert writer_of(path, names[:2]).finish().names() == names[:2]  # nothing to encode


def test_failures_are_tried_again_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES, {"a.jpg": "empty file"})
    assert open_cache_writer(path, NAMES, IDENTITY, False, False) is None
    writer = writer_of(path, NAMES, retry_failed=True)
    assert writer.cache.names(PENDING) == ["a.jpg"]
    fill(writer)
    cache = writer.finish()
    assert cache.failures() == {}
    assert_holds(cache, NAMES)
    make(tmp_path / "undisturbed.h5", NAMES)
    assert path.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()
    assert open_cache_writer(path, NAMES, IDENTITY, False, True) is None


def test_force_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, NAMES)
    writer = writer_of(path, NAMES, force=True)
    assert writer.cache.names(PENDING) == NAMES
    fill(writer, rows=2)
    other = dataclasses.replace(IDENTITY, weights_sha256="b" * 64)
    assert writer_of(path, NAMES, other, force=True).cache.names(PENDING) == NAMES
    partial_path(path).write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a readable feature cache"):
        writer_of(path, NAMES)
    assert fill(writer_of(path, NAMES, force=True)) == len(NAMES)


@pytest.mark.parametrize("option", ["precision", "engine"])
def test_other_rounding_is_refused_only_where_rows_are_to_be_made(
    tmp_path: Path, option: str
) -> None:
    path = tmp_path / "x.h5"
    writer = writer_of(path, NAMES)
    other = dataclasses.replace(IDENTITY, **{option: "other"})
    with pytest.raises(UserError, match=rf"begun with --{option} {getattr(IDENTITY, option)}, not"):
        open_cache_writer(path, NAMES, other, False, False)
    fill(writer)
    writer.finish()
    assert open_cache_writer(path, NAMES, other, False, False) is None
    with pytest.raises(UserError, match=rf"--{option}"):
        open_cache_writer(path, [*NAMES, "more.jpg"], other, False, False)


@pytest.mark.parametrize("field", ["encoder", "weights_sha256", "transform"])
@pytest.mark.parametrize("finished", [True, False])
def test_another_encoder_is_refused(tmp_path: Path, field: str, finished: bool) -> None:
    path = tmp_path / "x.h5"
    writer = writer_of(path, NAMES)
    fill(writer)
    if finished:
        writer.finish()
    before = {found.name: found.read_bytes() for found in tmp_path.iterdir()}
    other = dataclasses.replace(IDENTITY, **{field: "other"})
    with pytest.raises(UserError) as caught:
        open_cache_writer(path, NAMES, other, False, False)
    assert "\n" not in caught.value.message
    for words in (str(path), field.split("_")[0], "other against", "--force", "--output FILE"):
        assert words in caught.value.message
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == before


def test_where_the_weights_lay_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "x.h5", NAMES)
    moved = dataclasses.replace(IDENTITY, weights_source="/elsewhere/\udcff.pth", torchvision="9")
    assert open_cache_writer(tmp_path / "x.h5", NAMES, moved, False, False) is None
    assert IDENTITY.mismatch(moved) is None
    writer = writer_of(tmp_path / "y.h5", NAMES, moved)
    assert writer.cache.identity.weights_source == "/elsewhere/?.pth"


# Where nothing can be written


def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"x\.h5.*: cannot be written \(No space left") as caught:
        writer_of(tmp_path / "x.h5", NAMES)
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no"), AttributeError()])
def test_systems_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unsupported(*_: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert_holds(make(tmp_path / "x.h5", NAMES), NAMES)


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.h5").mkdir()
    for output, words in (
        ("file/x.h5", "cannot be written"),
        ("folder.h5", "is a folder"),
    ):
        with pytest.raises(UserError, match=words):
            writer_of(tmp_path / output, NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.h5"]


def test_a_cache_is_for_one_folder(tmp_path: Path) -> None:
    """Names such as 0001.jpg recur: another folder's features must not pass for this one's."""
    path = tmp_path / "x.h5"
    writer = open_cache_writer(path, NAMES, IDENTITY, False, False, data="/images/a")
    assert writer is not None
    writer.write(range(len(NAMES)), numpy.zeros((len(NAMES), FEATURE_SIZE)), {})
    assert writer.finish().data == "/images/a"
    with pytest.raises(UserError, match=r"/images/a, not .*/images/b; --output .*--force"):
        open_cache_writer(path, NAMES, IDENTITY, False, False, data="/images/b")
    assert open_cache_writer(path, NAMES, IDENTITY, False, False, data="/images/a") is None
