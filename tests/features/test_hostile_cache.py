"""Feature caches from strangers: read whole or refused in one line; nothing else is read."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import h5py
import numpy
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import IDENTITY

from pipeline.features.cache import SCHEMA_VERSION, FeatureCache, images_sha256
from pipeline.features.cache_writer import open_cache_writer
from pipeline.features.hdf5_layout import read_layout
from pipeline.features.sharded_cache import combine_shards, shard_path
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError

NAMES = ["a.jpg", "b/c.jpg", "d.jpg"]


def make(path: Path, names: list[str] = NAMES, data: str = "") -> Path:
    writer = open_cache_writer(path, names, IDENTITY, True, False, data)
    assert writer is not None
    values = numpy.random.default_rng(0).normal(size=(len(names), FEATURE_SIZE))
    writer.write(range(len(names)), values, {})
    writer.finish()
    return path


def make_sharded(path: Path, names: list[str] = NAMES) -> Path:
    shards = [shard_path(path, number, 2) for number in range(2)]
    cut = max(1, len(names) // 2)
    make(shards[0], names[:cut])
    make(shards[1], names[cut:])
    combine_shards(path, shards)
    return path


def use(path: Path) -> None:
    """Read all that there is in a cache."""
    cache = FeatureCache(path)
    names = cache.names()
    cache.rows(names)
    cache.failures()
    cache.damaged_rows()
    assert cache.read(numpy.arange(len(cache))).shape == (len(cache), FEATURE_SIZE)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        use(path)
    assert caught.value.message.startswith(f"{path}: ") and "\n" not in caught.value.message
    return caught.value.message


# The reader agrees with the library


name_lists = st.lists(
    st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=40).filter(
        lambda name: name not in (".", "..") and ":" not in name and "\\" not in name
    ),
    min_size=2,
    max_size=30,
    unique=True,
)


@given(names=name_lists, data=st.text(st.characters(exclude_characters="\0", codec="utf-8")))
@settings(max_examples=25)
def test_places_are_those_that_the_library_gives(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: str
) -> None:
    names = sorted(names, key=os.fsencode)
    path = make(tmp_path_factory.mktemp("cache") / "x.h5", names, data)
    layout = read_layout(path)
    with h5py.File(path) as file:
        assert layout.attributes == dict(file.attrs)
        assert layout.datasets.keys() == file.keys()
        for name, dataset in file.items():
            place = layout.datasets[name]
            assert (place.shape, place.offset) == (dataset.shape, dataset.id.get_offset())
            assert (place.dtype, place.size) == (dataset.dtype, dataset.id.get_storage_size())
    assert FeatureCache(path).names() == names


@pytest.mark.parametrize("shards", [2, 100])
def test_shards_are_those_that_the_library_gives(tmp_path: Path, shards: int) -> None:
    path = tmp_path / "x.h5"
    files = [shard_path(path, number, shards) for number in range(shards)]
    for number, file in enumerate(files):
        make(file, [f"{number:03}-{row}.jpg" for row in range(1 + number % 3)])
    combine_shards(path, files)
    sources = read_layout(path).datasets["features"].sources
    with h5py.File(path) as file:
        for ours, theirs in zip(sources, file["features"].virtual_sources(), strict=True):
            (first, _), (last, _) = theirs.vspace.get_select_bounds()
            assert (ours.file, ours.dataset) == (theirs.file_name, theirs.dset_name)
            assert (ours.first, ours.last) == (first, last)
        values = file["features"][:]
    cache = FeatureCache(path)
    assert (cache.read(numpy.arange(len(cache))) == values).all()


def test_the_library_does_not_read_caches(tmp_path: Path) -> None:
    """What it does with a spoiled file is no exception that could be caught."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.features.cache import FeatureCache\n"
        "print(FeatureCache(Path(sys.argv[1])).names())\nassert 'h5py' not in sys.modules\n"
    )
    for path in (make(tmp_path / "x.h5"), make_sharded(tmp_path / "y.h5")):
        ended = subprocess.run(
            [sys.executable, "-c", program, path], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout.strip()) == (0, str(NAMES)), ended.stderr


# Spoiled files


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_spoiled_bytes_are_a_cache_or_one_line(tmp_path: Path, seed: int, sharded: bool) -> None:
    path = (make_sharded if sharded else make)(tmp_path / "x.h5")
    content, random = path.read_bytes(), Random(seed)
    # Where something stands, not the zeros between; of the features only the first few.
    places = [place for place, byte in enumerate(content[:11_000]) if byte] + list(range(2048))
    refused = 0
    for _ in range(250):
        spoiled = bytearray(content)
        for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
            place, other = random.choice(places), random.choice(places)
            width = random.choice((1, 2, 4, 8, 16))
            change = random.randrange(4)
            if change == 0:
                spoiled[place] = random.randrange(256)
            elif change == 1:
                spoiled[place] ^= 1 << random.randrange(8)
            elif change == 2:
                spoiled[place : place + width] = random.choice((b"\0", b"\xff")) * width
            else:
                spoiled[place : place + width] = content[other : other + width]
        if random.random() < 0.1:
            spoiled = spoiled[: random.randrange(len(spoiled))]
        path.write_bytes(spoiled)
        try:
            use(path)
        except UserError as error:
            refused += 1
            assert "\n" not in error.message
    assert refused > 100


@given(content=st.binary(max_size=200), at=st.integers(0, 7200))
@settings(max_examples=100)
def test_any_bytes_anywhere(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, at: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.h5"
    make(path)
    spoiled = bytearray(path.read_bytes())
    spoiled[at : at + len(content)] = content
    path.write_bytes(spoiled)
    try:
        use(path)
    except UserError as error:
        assert "\n" not in error.message


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("offset", "size", "complaint"),
    [
        (1 << 40, None, "cut off"),
        (2**64 - 1, None, "cut off"),
        (2**64 - 6 * FEATURE_SIZE, None, "cut off"),
        (None, 1 << 40, "cut off"),
        (None, 1000, "cut off"),
        (0, None, "overlap"),
        (5000, None, "overlap"),
    ],
)
def test_features_elsewhere_than_in_their_place(
    tmp_path: Path, offset: int | None, size: int | None, complaint: str
) -> None:
    path = make(tmp_path / "x.h5")
    place = read_layout(path).datasets["features"]
    old = struct.pack("<QQ", place.offset, place.size)
    there = place.offset if offset is None else offset
    patched(path, old, struct.pack("<QQ", there, size or place.size))
    if complaint == "overlap":
        path.write_bytes(path.read_bytes() + bytes(1 << 16))  # so that it is not cut off
    assert complaint in refusal(path)


def test_a_header_that_goes_on_for_ever_ends(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5")
    content = bytearray(path.read_bytes())
    # The root's header begins at 96; its first message becomes one that the header goes on there.
    struct.pack_into("<HHBxxxQQ", content, 112, 0x10, 16, 0, 112, 1 << 12)
    struct.pack_into("<H", content, 98, 65535)
    path.write_bytes(content)
    assert "damaged" in refusal(path) or "missing" in refusal(path)


def test_a_heap_larger_than_memory_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.h5")
    start = b"GCOL\1\0\0\0"
    patched(path, start + struct.pack("<Q", 4096), start + struct.pack("<Q", 1 << 39))
    with path.open("r+b") as handle:  # a sparse file, so that it would be inside
        handle.truncate(1 << 40)
    assert "cut off" in refusal(path)


@pytest.mark.parametrize("address", [1 << 40, 2**63 - 1, 2**63, 2**64 - 2])
def test_addresses_behind_the_end_are_refused(tmp_path: Path, address: int) -> None:
    path = make(tmp_path / "x.h5")
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 64, address)  # of the root's header
    path.write_bytes(content)
    assert "cut off" in refusal(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 0, 3, 2047), (0, 0, 1, 2047)),  # in another order
        ((0, 0, 1, 2047), (0, 0, 1, 2047)),  # the same rows twice
        ((0, 0, 1, 2046), (2, 0, 3, 2047)),  # a number less in each row
        ((0, 0, 2, 2047), (3, 0, 3, 2047)),  # rows that the first file has not
        ((0, 0, 1, 2047), (2, 0, 4, 2047)),
    ],
)
def test_shards_that_do_not_make_up_the_rows_are_refused(
    tmp_path: Path, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    path = make_sharded(tmp_path / "x.h5", ["0.jpg", "1.jpg", "2.jpg", "3.jpg"])
    use(path)
    content = path.read_bytes()
    places = []
    for corners in ((0, 0, 1, 2047), (2, 0, 3, 2047)):
        assert content.count(struct.pack("<4I", *corners)) == 1
        places.append(content.index(struct.pack("<4I", *corners)))
    spoiled = bytearray(content)
    struct.pack_into("<4I", spoiled, places[0], *first)
    struct.pack_into("<4I", spoiled, places[1], *second)
    path.write_bytes(spoiled)
    assert "rows" in refusal(path)


# Files that the library makes, and would follow


def attributes(file: h5py.File) -> None:
    for field, value in dataclasses.asdict(IDENTITY).items():
        file.attrs[field] = value
    file.attrs["schema_version"] = SCHEMA_VERSION
    file.attrs["images_sha256"] = images_sha256(NAMES)
    file.attrs["data"] = ""


def whole(file: h5py.File) -> None:
    attributes(file)
    for name, values in {
        "features": numpy.zeros((3, FEATURE_SIZE), "<f2"),
        "names": numpy.array(NAMES, "S7"),
        "status": numpy.ones(3, "u1"),
        "reason": numpy.zeros(3, "S160"),
        "crc": numpy.zeros(3, "<u4"),
        "complete": numpy.ones(1, "u1"),
    }.items():
        file.create_dataset(name, data=values)


def replaced(file: h5py.File, name: str, **options: object) -> None:
    del file[name]
    file.create_dataset(name, **options)


def external_link(file: h5py.File) -> None:
    del file["features"]
    file["features"] = h5py.ExternalLink("secret.h5", "/features")


def soft_link(file: h5py.File) -> None:
    del file["features"]
    file["hidden"] = numpy.zeros((3, FEATURE_SIZE), "<f2")
    file["features"] = h5py.SoftLink("/hidden")


def external_storage(file: h5py.File) -> None:
    secret = str(Path(file.filename).with_name("secret.h5"))
    size = 3 * 2 * FEATURE_SIZE
    replaced(
        *(file, "features"),
        shape=(3, FEATURE_SIZE),
        dtype="<f2",
        external=[(secret, 0, size)],
    )


def virtual(*sources: tuple[str, str]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["features"]
        layout = h5py.VirtualLayout((3, FEATURE_SIZE), "<f2")
        for row, (name, dataset) in enumerate(sources):
            layout[row : row + 1] = h5py.VirtualSource(name, dataset, (1, FEATURE_SIZE), "<f2")
        file.create_virtual_dataset("features", layout)

    return change


def virtual_without_end(file: h5py.File) -> None:
    """The library opens such sources only to tell the shape."""
    del file["features"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = h5py.h5s.create_simple((3, FEATURE_SIZE), (h5py.h5s.UNLIMITED, FEATURE_SIZE))
    source = space.copy()
    unlimited = (h5py.h5s.UNLIMITED, 1)
    for chosen in (space, source):
        chosen.select_hyperslab((0, 0), unlimited, None, (1, FEATURE_SIZE))
    secret = str(Path(file.filename).with_name("secret.h5")).encode()
    plist.set_virtual(space, secret, b"features", source)
    h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F16LE, space, plist)


def odd_attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


CHANGES: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "external link": (external_link, "form|link|missing"),
    "soft link": (soft_link, "link"),
    "external storage": (external_storage, "features is missing"),
    "virtual, above": (virtual(*[("../secret.h5", "features")] * 3), "features in|other rows"),
    "virtual, dots": (virtual(*[("..", "features")] * 3), "features in"),
    "virtual, itself": (virtual(*[(".", "features")] * 3), "features in"),
    "virtual, other": (virtual(*[("secret.h5", "names")] * 3), "features in"),
    "virtual, thrice": (virtual(*[("secret.h5", "features")] * 3), "other rows"),
    "virtual, no end": (virtual_without_end, "virtual"),
    "compressed": (
        lambda f: replaced(f, "features", data=numpy.zeros((3, 2048), "f2"), compression="gzip"),
        "features is missing",
    ),
    "chunked": (
        lambda f: replaced(f, "features", data=numpy.zeros((3, 2048), "f2"), chunks=(1, 2048)),
        "features is missing",
    ),
    "of float32": (
        lambda f: replaced(f, "features", data=numpy.zeros((3, 2048), "f4")),
        "features is of another type",
    ),
    "big-endian": (
        lambda f: replaced(f, "features", data=numpy.zeros((3, 2048), ">f2")),
        "features is missing",
    ),
    "narrower": (
        lambda f: replaced(f, "features", data=numpy.zeros((3, 2047), "f2")),
        "features is of another type",
    ),
    "one more": (
        lambda f: replaced(f, "features", data=numpy.zeros((4, 2048), "f2")),
        "features is of another type",
    ),
    "names of any length": (
        lambda f: replaced(f, "names", data=NAMES, dtype=h5py.string_dtype()),
        "names is missing",
    ),
    "names in a table": (
        lambda f: replaced(f, "names", data=numpy.zeros((3, 1), "S7")),
        "names is of another type",
    ),
    "records": (
        lambda f: replaced(f, "status", data=numpy.zeros(3, [("a", "u1"), ("b", "f4")])),
        "status is missing",
    ),
    "status in floats": (
        lambda f: replaced(f, "status", data=numpy.zeros(3, "f4")),
        "status is of another type",
    ),
    "complete of none": (
        lambda f: replaced(f, "complete", data=numpy.zeros(0, "u1")),
        "complete is of another type|cut off",
    ),
    "a group": (lambda f: (f.__delitem__("crc"), f.create_group("crc")), "crc is missing"),
    "version as text": (odd_attribute("schema_version", "1"), "schema version 1"),
    "version as list": (odd_attribute("schema_version", [1, 1]), "schema version 1"),
    "version as float": (odd_attribute("schema_version", 1.0), "schema version 1"),
    "a reference": (odd_attribute("images_sha256", h5py.Reference()), "images_sha256"),
    "nothing": (odd_attribute("data", h5py.Empty("f4")), "data"),
    "encoder as numbers": (odd_attribute("encoder", numpy.arange(1000.0)), "encoder"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_laid_out_otherwise_is_refused(tmp_path: Path, change: str) -> None:
    """Beside the cache, and above it, lie files that must not be taken for its features."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for secret in (tmp_path / "secret.h5", folder / "secret.h5"):
        make(secret)
    path = folder / "x.h5"
    with h5py.File(path, "w") as file:
        whole(file)
    use(path)  # it is as such a cache may be, but for what follows
    alter, complaint = CHANGES[change]
    with h5py.File(path, "r+") as file:
        alter(file)
    message = refusal(path)
    assert any(words in message for words in complaint.split("|")), message


def test_the_newest_form_of_the_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver="latest") as file:
        whole(file)
    assert "form is not that of a feature cache" in refusal(path)


def test_pipes_and_folders_are_no_caches(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    for path in (tmp_path / "pipe.h5", tmp_path / "folder.h5"):
        assert "no such feature cache" in refusal(path)  # and does not wait for a writer


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", "a/.."]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "x.h5", ["a.jpg", name])
    assert f"names an image outside of its folder ({name})" in refusal(path)


def test_names_that_only_look_so_are_kept(tmp_path: Path) -> None:
    names = sorted(["..a.jpg", "a..jpg", "a/..b/c.jpg", "...", "x:y.jpg"])
    assert FeatureCache(make(tmp_path / "x.h5", names)).names() == names
