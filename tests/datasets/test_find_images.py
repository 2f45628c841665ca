"""Finding images: which files are images, and what other programs leave among them."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import draw

from pipeline.datasets.find_images import describe_skipped, find_images
from pipeline.utils.errors import UserError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="such names exist on Linux only")


def test_find_images(tmp_path: Path) -> None:
    wanted = ["B.JPG", "a b.png", "a.jpg", "a/é 狗.jpeg", "a/b/c.WebP", "Ångström.TIF", "z.Gif"]
    wanted += ["y.HEIC", "y.heif", "y.hif", "y.avif", "y.mpo"]
    for name in (*wanted, "jpg", "x.jpg.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    draw(tmp_path / "folder.jpg" / "inner.jpg")
    expected = sorted([*wanted, "folder.jpg/inner.jpg"], key=os.fsencode)
    assert find_images(tmp_path) == expected
    (tmp_path / "empty").mkdir()
    assert find_images(tmp_path / "empty") == []


@linux_only
def test_names_that_only_linux_allows(tmp_path: Path) -> None:
    names = [b"line\nend.jpg", "\U0001f600.jpg".encode(), b"\xff\xfe.jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    found = find_images(tmp_path)
    assert [os.fsencode(name) for name in found] == names  # \xff after the emoji: by bytes
    assert all((tmp_path / name).is_file() for name in found)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_links(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    draw(elsewhere / "far.jpg")
    draw(data / "near.jpg")
    (data / "link").symlink_to(elsewhere)
    (data / "loop").symlink_to(data)
    (elsewhere / "back").symlink_to(data)
    assert find_images(data) == ["link/far.jpg", "near.jpg"]


def test_no_such_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", draw(tmp_path / "x.jpg")):
        with pytest.raises(UserError, match="no such folder of images") as caught:
            find_images(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "left_out, kind",
    [
        ("@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "folders of thumbnails"),
        ("trip/SYNOPHOTO_THUMB_M.jpg", "thumbnails"),
        ("Photos Previews.lrdata/1.jpg", "folders of thumbnails"),
        ("#recycle/a.jpg", "recycle bins"),
        ("$Recycle.Bin/S-1-5/$R1.jpg", "recycle bins"),
        ("trip/@Recycle/a.jpg", "recycle bins"),
        ("#snapshot/monday/a.jpg", "snapshots"),
        (".thumbnails/a.jpg", "hidden folders"),
        ("._a.jpg", "hidden files"),
        ("trip/__MACOSX/a.jpg", "leftovers of macOS archives"),
        ("index_files/0123.webp", "folders of web pages"),
        ("run/curves.png", "curves of training runs"),
        ("notes.txt", "files with other endings"),
    ],
)
def test_what_other_programs_left_is_skipped_and_counted(
    tmp_path: Path, left_out: str, kind: str
) -> None:
    kept = ["a.jpg", "index_files.jpg", "trip/b.jpg", "trip_files/c.jpg"]
    beside = ["index.html", "run/config.json"]
    for name in (*kept, *beside, left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    skipped: Counter[str] = Counter()
    assert find_images(tmp_path, skipped) == kept
    skipped["files with other endings"] -= len(beside)
    assert +skipped == {kind: 1}
    assert describe_skipped(Counter({kind: 1234})) == f"skipped: {kind} (1,234)"


def test_a_folder_that_cannot_be_listed_is_an_error_not_empty(
    tmp_path: Path, unlistable: Callable[[str, int], None]
) -> None:
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "share" / "b.jpg")
    unlistable("share", errno.EIO)
    with pytest.raises(UserError, match=r"share: cannot be listed \(Input/output error\)"):
        find_images(tmp_path)
    errors: list[OSError] = []
    assert find_images(tmp_path, on_error=errors.append) == ["a.jpg"]
    assert [error.errno for error in errors] == [5]
