"""The feature cache: its layout, finding rows, damage, copies by HDF5 tools, hostile files."""

from __future__ import annotations

import dataclasses
import errno
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import h5py
import numpy
import pytest
from small_data import IDENTITY

from pipeline.features.cache import (
    DONE,
    FAILED,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    FeatureCache,
    partial_path,
)
from pipeline.features.cache_writer import CacheWriter, open_writer
from pipeline.features.sharded_cache import combine_shards, earlier_work, shard_path
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError

NAMES = ["a.jpg", "b/c.jpg", "d.jpg", "é 狗.jpg"]


def feature(name: str) -> numpy.ndarray:
    """Return the features that an image of this name has in these tests."""
    generator = numpy.random.default_rng(list(os.fsencode(name)))
    return generator.normal(size=FEATURE_SIZE).astype(numpy.float32)


def writer_of(path: Path, names: list[str] = NAMES, retry_failed: bool = False) -> CacheWriter:
    return open_writer(
        path, names, IDENTITY, sources=earlier_work(path, path), retry_failed=retry_failed
    )


def fill(writer: CacheWriter, broken: dict[str, str] | None = None, rows: int = 1 << 30) -> int:
    """Write ``rows`` pending rows, one per batch; returns how many were written."""
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


def make(
    path: Path, names: list[str] = NAMES, broken: dict[str, str] | None = None
) -> FeatureCache:
    writer = writer_of(path, names)
    fill(writer, broken)
    return writer.finish()


def assert_holds(cache: FeatureCache, names: list[str]) -> None:
    rows = cache.rows(names)
    assert (rows >= 0).all()
    assert (cache.status[rows] == DONE).all()
    expected = numpy.stack([feature(name).astype(numpy.float16) for name in names])
    assert (cache.read(rows) == expected).all()
    assert (cache.read(rows[::-1]) == expected[::-1]).all()
    assert len(cache.damaged_rows()) == 0


def use(path: Path) -> tuple[object, ...]:
    """Read all that a training reads of a cache."""
    cache = FeatureCache(path)
    names = cache.names(DONE)
    rows = cache.rows(names)
    cache.refuse_damage(cache.damaged_rows(rows))
    return names, cache.read(rows).tobytes(), cache.failures(), cache.identity, cache.data


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        use(path)
    assert "\n" not in caught.value.message
    return caught.value.message


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
        }
        for values in file.values():
            assert values.chunks is None
            assert values.id.get_create_plist().get_nfilters() == 0
            assert values.id.get_offset() is not None
        texts = {"data": "", **dataclasses.asdict(IDENTITY)}
        assert {name: file.attrs[name].decode() for name in texts} == texts
        assert file.attrs["schema_version"] == SCHEMA_VERSION
        assert list(file["names"].asstr()) == NAMES
        assert list(file["reason"].asstr()) == ["", "", "empty file", ""]
        assert file["status"][:].tolist() == [DONE, DONE, FAILED, DONE]
        assert (file["features"][1] == feature("b/c.jpg").astype("f2")).all()
    assert [found.name for found in path.parent.iterdir()] == ["x.h5"]


def test_global_settings_of_h5py_and_the_clock_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "x.h5")
    monkeypatch.setattr(h5py.get_config(), "track_order", True)
    make(tmp_path / "y.h5")
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "y.h5").read_bytes()


def test_rows_are_written_without_a_change_to_the_structure(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "x.h5")
    before = bytearray(writer.cache.path.read_bytes())
    fill(writer, {"a.jpg": "empty file"})
    after = bytearray(writer.finish().path.read_bytes())
    for dtype, shape, offset in writer.cache.datasets.values():
        assert offset is not None
        size = dtype.itemsize * int(numpy.prod(shape))
        before[offset : offset + size] = after[offset : offset + size] = bytes(size)
    assert before == after


def test_rows_are_in_the_order_of_bytes(tmp_path: Path) -> None:
    names = ["b", "B", "a/b", "a b", "a.b", "\U0001f600", "\uffee", "é", "e\u0301", "zz", "z"]
    names += ["..a.jpg", "a..jpg", "a/..b/c.jpg", "...", "x:y.jpg"]
    names += ["x" * 200 + "/" + "狗" * number + ".jpg" for number in (1, 70, 71)]
    if os.name == "posix":
        names += [os.fsdecode(b"\xff.jpg"), os.fsdecode(b"\x80"), "line\nend"]
    names.sort(key=os.fsencode)
    cache = make(tmp_path / "x.h5", names)
    assert cache.names() == names
    assert_holds(cache, names[::-1])


def test_finding_rows(tmp_path: Path) -> None:
    cache = make(tmp_path / "x.h5")
    wanted = ["d.jpg", "", "a.jp", "a.jpg", "a.jpg2", "zzz", "a.jpg", "é 狗.jpg" + "x" * 300]
    assert cache.rows(wanted).tolist() == [2, -1, -1, 0, -1, -1, 0, -1]
    assert cache.rows([]).shape == (0,)
    values = cache.read(cache.rows(["d.jpg", "a.jpg", "d.jpg"]))
    assert values.dtype == numpy.float32
    assert (values[0] == values[2]).all()
    assert (values[1] == feature("a.jpg").astype("f2")).all()


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
    assert peak < 200_000  # the names alone are 400,000 bytes, the features 80 million


@pytest.mark.parametrize(
    "reason, kept",
    [
        ("short", "short"),
        ("x" * 400, "x" * REASON_BYTES),
        ("x" + "é" * 100, "x" + "é" * 79),  # the 160th byte is half a letter
        ("broken \udcff name", "broken ? name"),
    ],
)
def test_reasons_are_cut_between_letters(tmp_path: Path, reason: str, kept: str) -> None:
    cache = make(tmp_path / "x.h5", NAMES, {"a.jpg": reason})
    assert cache.failures() == {"a.jpg": kept}
    assert cache.names(FAILED) == ["a.jpg"]
    assert cache.names(DONE) == NAMES[1:]


# HDF5 tools


def copied(old: Path, new: Path, **options: object) -> None:
    with h5py.File(old) as source, h5py.File(new, "w") as copy:
        copy.attrs.update(source.attrs)
        for name in source:
            if options:
                copy.create_dataset(name, data=source[name][:], **options)
            else:
                source.copy(name, copy)


@pytest.mark.parametrize("options", [{}, {"chunks": True, "compression": "gzip"}])
@pytest.mark.parametrize("finished", [True, False])
def test_a_copy_made_by_h5py_is_read_and_gone_on_with(
    tmp_path: Path, options: dict[str, object], finished: bool
) -> None:
    path, original = tmp_path / "x.h5", tmp_path / "original.h5"
    make(original, NAMES, {"d.jpg": "empty file"})
    if finished:
        copied(original, path, **options)
        cache = FeatureCache(path)
        assert use(path) == use(original)
        assert_holds(cache, ["é 狗.jpg", "a.jpg"])
        assert cache.rows(["d.jpg", "x"]).tolist() == [2, -1]
    else:
        writer = writer_of(tmp_path / "begun.h5")
        fill(writer, rows=2)
        copied(writer.cache.path, partial_path(path), **options)
    writer = writer_of(path)
    assert fill(writer, {"d.jpg": "empty file"}) == (0 if finished else 2)
    assert use(writer.finish().path) == use(original)


def test_an_attribute_and_a_dataset_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path)
    before = use(path)
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "mine"
        file["features"].attrs["unit"] = "none"
        file["more"] = numpy.arange(5)
    assert use(path) == before


# Damage


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Return start and end of each dataset's bytes."""
    with h5py.File(path) as file:
        return {
            name: (start, start + values.id.get_storage_size())
            for name, values in file.items()
            if (start := values.id.get_offset()) is not None
        }


@pytest.mark.parametrize("finished", [True, False])
def test_a_byte_spoiled_in_any_column_costs_its_row(tmp_path: Path, finished: bool) -> None:
    path, random = tmp_path / "x.h5", Random(0)
    broken = {"d.jpg": "empty file"}
    whole = make(path, NAMES, broken).path.read_bytes()
    if not finished:
        path.unlink()
        fill(writer_of(path), broken)
    found = path if finished else partial_path(path)
    content = found.read_bytes()
    for name, (start, end) in places(found).items():
        row_bytes = (end - start) // len(NAMES)
        for row in range(len(NAMES)):
            spoiled = bytearray(content)
            spoiled[start + row * row_bytes + random.randrange(row_bytes)] ^= 0x40
            path.unlink(missing_ok=True)
            found.write_bytes(spoiled)
            assert FeatureCache(found).damaged_rows().tolist() == [row], (name, row)
            writer = writer_of(path)
            assert writer.cache.names(PENDING) == [NAMES[row]]
            fill(writer, broken)
            assert writer.finish().path.read_bytes() == whole, (name, row)


def test_a_spoiled_structure_is_a_cache_or_one_line(tmp_path: Path) -> None:
    """HDF5's checksums find what is spoiled in its own structures."""
    path, random = tmp_path / "x.h5", Random(0)
    make(path)
    content, expected = path.read_bytes(), use(path)
    start = min(start for start, _ in places(path).values())
    used = [place for place in range(start) if content[place]]
    refused = 0
    for _ in range(200):
        spoiled = bytearray(content)
        spoiled[random.choice(used)] ^= random.randrange(1, 256)
        path.write_bytes(spoiled)
        try:
            seen = use(path)
            assert seen == expected
        except UserError as error:
            assert "\n" not in error.message
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
def test_features_that_are_no_numbers_are_damage(tmp_path: Path, value: float) -> None:
    """Their checksums match, as in a stranger's cache; a search through them finds no caption."""
    writer = writer_of(tmp_path / "x.h5")
    for [row] in writer.pending_batches(1):
        features = feature(writer.cache.name(row))[None].copy()
        features[0, 1000] = value if row == 1 else -65504  # the lowest float16
        writer.write([row], features, {})
    writer.finish()
    assert FeatureCache(tmp_path / "x.h5").damaged_rows().tolist() == [1]


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    assert "x.h5: no such feature cache; make it with" in refusal(path)
    make(path)
    content = path.read_bytes()
    for garbage in (b"", b"garbage", content[: len(content) // 2], content[:-1]):
        path.write_bytes(garbage)
        message = refusal(path)
        assert "x.h5: not a readable feature cache" in message and "--force" in message
    (tmp_path / "folder.h5").mkdir()
    assert "no such feature cache" in refusal(tmp_path / "folder.h5")


# Files from strangers


def replaced(name: str, **options: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def linked(link: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["hidden"] = file["features"][:]
        del file["features"]
        file["features"] = link

    return change


def external_storage(file: h5py.File) -> None:
    secret = str(Path(file.filename).with_name("secret.h5"))
    size = 2 * FEATURE_SIZE * len(NAMES)
    replaced(
        "features", shape=(len(NAMES), FEATURE_SIZE), dtype="<f2", external=[(secret, 0, size)]
    )(file)


def virtual(name: str, dataset: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["features"]
        layout = h5py.VirtualLayout((len(NAMES), FEATURE_SIZE), "<f2")
        layout[:] = h5py.VirtualSource(name, dataset, (len(NAMES), FEATURE_SIZE), "<f2")
        file.create_virtual_dataset("features", layout)

    return change


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


ROWS = len(NAMES)
CHANGES: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "external link": (linked(h5py.ExternalLink("secret.h5", "/features")), "features is missing"),
    "soft link": (linked(h5py.SoftLink("/hidden")), "features is missing"),
    "external storage": (external_storage, "features is stored in other files"),
    "virtual, above": (virtual("../secret.h5", "features"), "features in '../secret.h5'"),
    "virtual, absolute": (virtual("/etc/passwd", "features"), "features in"),
    "virtual, by its name": (virtual("x.h5", "features"), "features is a virtual dataset"),
    "virtual, other": (virtual("secret.h5", "names"), "features in 'secret.h5'"),
    "virtual, no cache": (virtual("other.h5", "features"), "other.h5: not a feature cache"),
    "of float32": (replaced("features", data=numpy.zeros((ROWS, 2048), "f4")), "features has"),
    "one more": (replaced("features", data=numpy.zeros((ROWS + 1, 2048), "f2")), "features has"),
    "names of any length": (replaced("names", data=NAMES, dtype=h5py.string_dtype()), "names has"),
    "one name": (replaced("names", data=numpy.zeros((), "S7")), "another type"),
    "a group": (lambda f: (f.pop("crc"), f.create_group("crc")), "crc is missing"),
    "another version": (attribute("schema_version", 1), "schema version 2"),
    "version as text": (attribute("schema_version", "2"), "schema version 2"),
    "nothing": (attribute("data", h5py.Empty("f4")), "data is no text"),
    "encoder as numbers": (attribute("encoder", numpy.arange(1000.0)), "encoder is no text"),
    "no encoder": (lambda f: f.attrs.__delitem__("encoder"), "attribute"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_laid_out_otherwise_is_refused(tmp_path: Path, change: str) -> None:
    """Beside the cache, and above it, lie files that must not be taken for its features."""
    path = tmp_path / "folder" / "x.h5"
    for secret in (tmp_path / "secret.h5", path.with_name("secret.h5"), path):
        make(secret)
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["features"] = numpy.zeros((ROWS, FEATURE_SIZE), "<f2")
    alter, complaint = CHANGES[change]
    with h5py.File(path, "r+") as file:
        alter(file)
    assert complaint in refusal(path)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    writer = open_writer(tmp_path / "x.h5", [name, "a.jpg"], IDENTITY)
    writer.write([0, 1], numpy.zeros((2, FEATURE_SIZE)), {})
    writer.finish()
    assert f"names an image outside of its folder ({name})" in refusal(tmp_path / "x.h5")


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shards = [shard_path(tmp_path / "x.h5", number, 2) for number in range(2)]
    make(shards[0], NAMES[:2])
    make(shards[1], NAMES[2:])
    assert_holds(combine_shards(tmp_path / "x.h5", shards), NAMES)
    make(tmp_path / "short.h5", NAMES[:1]).path.replace(shards[0])
    assert "x.h5.shard-0-of-2 has other rows" in refusal(tmp_path / "x.h5")
    make(tmp_path / "whole.h5", NAMES[:2]).path.replace(shards[0])
    shards[1].unlink()
    assert "x.h5.shard-1-of-2: missing, though x.h5 needs it" in refusal(tmp_path / "x.h5")


# Going on


def test_resume_keeps_rows(tmp_path: Path) -> None:
    make(tmp_path / "undisturbed.h5")
    path = tmp_path / "x.h5"
    writer = writer_of(path)
    fill(writer, {"a.jpg": "empty file"}, rows=3)
    assert not path.exists()
    assert "x.h5: the feature cache is not finished; run extract" in refusal(path)
    writer = writer_of(path)
    assert writer.cache.status.tolist() == [FAILED, DONE, DONE, PENDING]
    assert writer.write([0], feature("a.jpg")[None], {}) == 0  # again with its batch, mended now
    assert fill(writer) == 1
    assert writer.finish().complete
    assert path.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()


def test_rows_are_done_only_once_they_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_of(tmp_path / "x.h5")
    synced = []

    def fsync(_: int) -> None:
        assert (writer.cache.status == PENDING).all()
        assert (writer.cache.read(numpy.array([0])) == feature("a.jpg").astype("f2")).all()
        synced.append(True)

    monkeypatch.setattr(os, "fsync", fsync)
    assert writer.write([0], feature("a.jpg")[None], {1: "broken"}) == 2
    assert writer.cache.status.tolist() == [PENDING] * 4
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", 0.0)
    writer.write([], numpy.empty((0, FEATURE_SIZE)), {})  # commits by itself
    assert synced == [True]
    assert writer.cache.status.tolist() == [DONE, FAILED, PENDING, PENDING]


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
    retried = writer_of(path, names, retry_failed=True)
    assert retried.cache.names(PENDING) == ["d.jpg"]
    fill(retried)
    sources = [retried.cache, FeatureCache(path)]  # the first that has a row gives it
    writer = open_writer(path, [*names, "z.jpg"], IDENTITY, sources=sources)
    assert writer.cache.names(PENDING) == ["z.jpg"] and not writer.cache.failures()
    assert writer_of(path, names[:2]).finish().names() == names[:2]  # nothing to encode


# Where nothing can be written


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no"), AttributeError()])
def test_systems_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unsupported(*_: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert_holds(make(tmp_path / "x.h5"), NAMES)
