"""Archives from strangers: nothing is written or read outside the folder that was named."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.datasets import flickr8k as download
from pipeline.datasets.flickr8k import unpack_zip
from pipeline.datasets.images import ImageError
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

PARTS = st.sampled_from(["..", ".", "", "a", "b.jpg", "C:", "\\..\\x", "a\n", "\x1b[2J", "é", "~"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.text(min_size=1, max_size=30)


def inside(folder: Path) -> set[str]:
    return {os.path.relpath(path, folder) for path in folder.rglob("*")}


def unpack(content: bytes, base: Path) -> None:
    """Unpack a ZIP file, or be told in one line why not; nothing may lie elsewhere."""
    (base / "deep" / "folder").mkdir(parents=True, exist_ok=True)
    archive = base / "deep" / "some.zip"
    archive.write_bytes(content)
    try:
        unpack_zip(archive, base / "deep" / "folder")
    except UserError as error:
        assert "\n" not in error.format_message()
    assert {name for name in inside(base) if not name.startswith("deep/folder")} == {
        "deep",
        "deep/some.zip",
    }
    for path in (base / "deep" / "folder").rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            path.unlink()


def zipped(names: list[str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"content of " + name.encode(errors="replace"))
    return content.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(names=st.lists(NAMES, max_size=4))
@example(names=["a", "a/b", "a"])
@example(names=["a.txt", "a.txt"])
@example(names=["x" * 300])
@settings(max_examples=150)
def test_whatever_its_names(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    unpack(zipped(names), tmp_path_factory.mktemp("names"))


@given(at=st.integers(0, 400), new=st.binary(min_size=1, max_size=8))
@settings(max_examples=150)
def test_whatever_becomes_of_it(
    at: int, new: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(zipped(["a.jpg", "b/c.jpg", "../d.jpg"][: 2 + at % 2]))
    content[at : at + len(new)] = new
    unpack(bytes(content), tmp_path_factory.mktemp("spoiled"))


def test_a_size_that_lies_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_UNPACKED", 1000)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    size = (10_000_000).to_bytes(4, "little")
    spoiled = content.getvalue().replace(size, (10).to_bytes(4, "little"))
    assert spoiled != content.getvalue()
    (tmp_path / "some.zip").write_bytes(spoiled)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_zip(tmp_path / "some.zip", tmp_path / "folder")
    assert not any(path.is_file() for path in (tmp_path / "folder").rglob("*"))


def tar(names: list[str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
    return content.getvalue()


def test_names_in_shards_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    names = ["../secret.jpg", "a/../../secret.jpg", str(tmp_path / "secret.jpg"), "a.jpg"]
    (tmp_path / "0.tar").write_bytes(tar(names))
    shards = TarShards(str(tmp_path / "0.tar"))
    assert not any(".." in name.split("/") for name in shards.names)
    assert len(shards.names) == 2
    for name in shards.names:
        assert shards.image(name).read() == b"data"


@given(at=st.integers(0, 2000), new=st.binary(min_size=1, max_size=12), left=st.floats(0.5, 1))
@settings(max_examples=200)
def test_any_shard_is_read_or_refused(
    at: int, new: bytes, left: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(tar(["a.jpg", "b.jpg", "b.txt"]))
    content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "spoiled.tar"
    path.write_bytes(content[: int(left * len(content))])
    try:
        shards = TarShards(str(path))
        shards.read_captions()
        for name in shards.names:
            shards.image(name).read()
    except UserError as error:
        assert "\n" not in error.format_message()
    except ImageError as error:
        assert str(error)
