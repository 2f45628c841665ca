"""Captions in images' own metadata: they read back, and nothing else of an image changes."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pytest
import tagged_images
from conftest import draw
from PIL import Image, ImageSequence, IptcImagePlugin, features
from tagged_images import exif, iptc_segment, make_tagged, photograph

from pipeline.datasets import images
from pipeline.outputs import metadata, metadata_tools
from pipeline.outputs.metadata import (
    MetadataError,
    check_available,
    is_filler,
    read_description,
    write_description,
)
from pipeline.outputs.metadata_tools import TOOLS
from pipeline.utils.errors import UserError

PYEXIV2, EXIFTOOL = TOOLS
if not (PYEXIV2.available() or EXIFTOOL.available()):
    pytest.skip("neither pyexiv2 nor exiftool is installed", allow_module_level=True)
TEXT = 'con chó chạy trên bãi cỏ, 一只狗 😀 & <b> "quoted", it\'s 100% #1'
BY_PYEXIV2 = ("jpg", "png", "webp", "tif", "jp2")
BY_EXIFTOOL = (*BY_PYEXIV2, "gif", "heic", "avif")
# What may be new after a description was written.
NEW = set(
    "XMPToolkit ExifByteOrder CodedCharacterSet EnvelopeRecordVersion ApplicationRecordVersion "
    "CurrentIPTCDigest ExifVersion ComponentsConfiguration FlashpixVersion YCbCrPositioning "
    "XResolution YResolution ResolutionUnit Caption-Abstract Description ImageDescription "
    "ColorSpace GIFVersion".split()
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="POSIX files on Linux")


def use_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Leave one tool; skip where it is missing."""
    (tool,) = (tool for tool in TOOLS if tool.name == name)
    if not tool.available():
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(metadata, "TOOLS", (tool,))


def needs(extension: str) -> None:
    """Skip where Pillow cannot make this format here, or nothing writes into it."""
    if extension == "heic":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if extension not in BY_PYEXIV2 and not EXIFTOOL.available():
        pytest.skip(f"nothing is installed that writes into {extension}")


def everything(path: Path) -> dict[str, Any]:
    """Read all metadata with exiftool, but those of the file system and positions."""
    if not EXIFTOOL.available():
        pytest.skip("exiftool, which compares, is not installed")
    command = ["exiftool", "-config", "", "-j", "-a", "-G1", "-n", "-q", "-q", str(path)]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    (tags,) = json.loads(output.decode("utf-8", "replace"))
    left_out = ("System:", "ExifTool:", "SourceFile", "Composite:")
    moving = ("Offset", "Offsets", "MediaDataSize", "XMPToolkit", "ExifByteOrder", "WebP_Flags")
    return {
        key: value
        for key, value in tags.items()
        if not key.startswith(left_out) and not key.endswith(moving)
    }


def seen(path: Path) -> tuple[bytes | None, list[tuple[str, bytes]]]:
    """Return the colour profile, and mode and pixels of each frame."""
    images._register_heif()
    with Image.open(path) as image:
        frames = [(frame.mode, frame.tobytes()) for frame in ImageSequence.Iterator(image)]
        return image.info.get("icc_profile"), frames


def status(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_mode, found.st_uid, found.st_gid, found.st_atime_ns, found.st_mtime_ns


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written, and what is kept


@pytest.mark.parametrize(
    "tool, extension",
    [("pyexiv2", extension) for extension in BY_PYEXIV2]
    + [("exiftool", extension) for extension in BY_EXIFTOOL],
)
def test_only_the_description_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, extension: str
) -> None:
    needs(extension)
    use_only(monkeypatch, tool)
    path = make_tagged(tmp_path / f"x.{extension}")
    looks, before = seen(path), everything(path)
    path.chmod(0o640)
    os.utime(path, ns=(1_111_111_111_123_456_789, 1_000_000_000_987_654_321))
    old = status(path)
    write_description(path, TEXT)
    assert status(path) == old
    assert read_description(path) == TEXT
    assert seen(path) == looks
    assert (looks[0] is None) == (extension in ("gif", "jp2"))
    after = everything(path)
    assert {key: after.get(key) for key in before} == before
    new = after.keys() - before.keys()
    assert {key.split(":")[1] for key in new} <= NEW
    assert after["XMP-dc:Description"] == TEXT
    assert after.get("IFD0:ImageDescription") == (None if extension == "gif" else TEXT)
    assert after.get("IPTC:Caption-Abstract") == (TEXT if extension == "jpg" else None)
    if extension in ("jpg", "png", "webp", "heic"):  # where Pillow takes such EXIF as it is
        assert before["GPS:GPSLatitude"] == pytest.approx(10 + 46 / 60 + 37 / 3600)
        assert before["Canon:OwnerName"] == "The owner's name"
        assert before["IFD1:ThumbnailLength"] == len(tagged_images.thumbnail())
        assert before["IFD0:Orientation"] == 6
    if extension not in ("gif", "jp2"):
        assert before["XMP-dc:Description-de"] == "Ein Hund"
        assert before["XMP-own:Note"] == "không đổi"
    assert names(tmp_path) == [f"x.{extension}"]


TEXTS = (TEXT, "12.50", "a, lang=de b\nc", "x" * 2000, "&amp;")


@pytest.mark.parametrize(
    "tool, text",
    [("pyexiv2", text) for text in TEXTS] + [("exiftool", text) for text in TEXTS[:3]],
)
def test_a_jpeg_holds_the_text_three_times_as_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, text: str
) -> None:
    use_only(monkeypatch, tool)
    path = draw(tmp_path / "x.jpg")
    if tool == "pyexiv2":
        write_description(path, "the first")
    write_description(path, text)
    # Read without the tools that wrote it.
    with Image.open(path) as image:
        iptc = IptcImagePlugin.getiptcinfo(image)
        assert iptc is not None
        assert iptc[1, 90] == b"\x1b%G"
        assert iptc[2, 120] == text.encode()
        assert text.encode() + b"\0" in image.info["exif"]
        described = image.getxmp()["xmpmeta"]["RDF"]["Description"]["description"]
        assert described["Alt"]["li"] == {"lang": "x-default", "text": text}
    assert b"the first" not in path.read_bytes()
    assert read_description(path) == text


@pytest.mark.parametrize("tool", ["pyexiv2", "exiftool"])
def test_old_iptc_in_latin_1_becomes_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    use_only(monkeypatch, tool)
    path = draw(tmp_path / "x.jpg")
    content = path.read_bytes()
    segment = iptc_segment([(2, 25, b"Stra\xdfe"), (2, 25, b"b"), (2, 90, b"K\xf6ln")])
    path.write_bytes(content[:2] + segment + content[2:])
    write_description(path, "chó")
    with Image.open(path) as image:
        iptc = IptcImagePlugin.getiptcinfo(image)
    assert iptc is not None
    assert iptc[1, 90] == b"\x1b%G"
    assert iptc[2, 90] == "Köln".encode()
    assert iptc[2, 25] == ["Straße".encode(), b"b"]
    assert iptc[2, 120] == "chó".encode()


def test_iptc_that_stands_in_a_tiff_is_kept_in_step(tmp_path: Path) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="pyexiv2 is not installed")
    path = draw(tmp_path / "x.tif")
    write_description(path, "first")
    with pyexiv2.Image(str(path)) as image:
        assert image.read_iptc() == {}
        image.modify_iptc({"Iptc.Application2.Caption": "old", "Iptc.Application2.City": "Huế"})
    write_description(path, "second")
    with pyexiv2.Image(str(path)) as image:
        assert image.read_iptc()["Iptc.Application2.Caption"] == "second"
        assert image.read_iptc()["Iptc.Application2.City"] == "Huế"


@pytest.mark.parametrize("tool", ["pyexiv2", "exiftool"])
def test_other_parts_of_a_jpeg_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    """Other programs' segments, the film at the end of a phone's JPEG, and a second image."""
    use_only(monkeypatch, tool)
    path, both = make_tagged(tmp_path / "x.jpg"), tmp_path / "both.jpg"
    copyrighted = b"8BIM\x04\x0a\0\0\0\0\0\1\1\0"
    others = {
        0xED: b"Photoshop 3.0\0" + copyrighted,
        0xEB: b"JP\0\1\0\0\0\1c2pa" * 9,
        0xE7: b"unknown",
    }
    segments = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in others.items()
    )
    film = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 20
    content = path.read_bytes()
    path.write_bytes(content[:20] + segments + content[20:] + film)
    write_description(path, TEXT)
    written = path.read_bytes()
    assert all(body in written for body in (copyrighted, others[0xEB], others[0xE7]))
    assert written.endswith(film)
    photograph().save(both, "MPO", save_all=True, append_images=[photograph().rotate(180)])
    pixels = seen(both)
    assert len(pixels[1]) == 2
    write_description(both, TEXT)
    assert seen(both) == pixels


def test_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(numpy.arange(120_000, dtype=numpy.uint16).reshape(300, 400)).save(path)
    pixels = seen(path)
    write_description(path, TEXT)
    assert seen(path) == pixels


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_only(monkeypatch, "pyexiv2")  # whose log goes to standard output unless it is stopped
    path = make_tagged(tmp_path / "x.jpg", b"Exif\0\0II*\0\x08\0\0\0\x01\0\xff\xff\xff\xff")
    read_description(path)
    write_description(path, TEXT)
    assert read_description(path) == TEXT
    assert capfd.readouterr() == ("", "")


@linux_only
@pytest.mark.parametrize(
    "name",
    [
        "chú chó 狗 😀.jpg".encode(),
        b'it\'s "quoted" $HOME `x`.jpg',
        b"\xff\xfe.jpg",
        b"line\nend.jpg",
        b"-o.jpg",
        b"really a.png",
    ],
)
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    photograph().save(path, "JPEG")
    monkeypatch.chdir(tmp_path)
    write_description(Path(path.name), TEXT)
    assert read_description(Path(path.name)) == TEXT
    assert names(tmp_path) == [os.fsdecode(name)]


@linux_only
def test_a_link_stays_a_link_and_extended_attributes_are_kept(tmp_path: Path) -> None:
    path = draw(tmp_path / "far" / "x.jpg")
    with contextlib.suppress(OSError):  # where the file system has none
        os.setxattr(path, "user.tag", b"family")
    attributes = os.listxattr(path)
    link, link_to_link = tmp_path / "link.jpg", tmp_path / "other.jpg"
    link.symlink_to("far/x.jpg")
    link_to_link.symlink_to(link)
    write_description(link_to_link, TEXT)
    assert link.is_symlink() and link_to_link.is_symlink()
    assert read_description(path) == TEXT
    assert names(path.parent) == ["x.jpg"] and os.listxattr(path) == attributes
    (tmp_path / "nowhere.jpg").symlink_to("missing.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    assert reason(tmp_path / "nowhere.jpg") == "no such file"
    assert reason(tmp_path / "circle.jpg") == "its symbolic links run in a circle"


def test_exiftool_helps_where_pyexiv2_gives_up(tmp_path: Path) -> None:
    if not (PYEXIV2.available() and EXIFTOOL.available()):
        pytest.skip("pyexiv2 or exiftool is not installed")
    path = tmp_path / "x.jpg"
    photograph().save(path, icc_profile=b"no profile at all" * 20)
    with pytest.raises(metadata_tools.ToolError, match="ICC"):
        PYEXIV2.write(path.read_bytes(), "JPEG", TEXT)
    write_description(path, TEXT)
    assert read_description(path) == TEXT
    assert seen(path)[0] == b"no profile at all" * 20


# Failures leave no trace


def reason(path: Path, text: str = TEXT) -> str:
    """Fail to write, see that nothing has changed, and give the reason."""
    folder = path.parent
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(MetadataError) as caught:
        write_description(path, text)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert "\n" not in str(caught.value) and str(folder) not in str(caught.value)
    return str(caught.value)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raiser(error: BaseException) -> Any:
    def fail(*arguments: Any, **options: Any) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    "function, error, expected",
    [
        ("pyexiv2.ImageData.modify_xmp", RuntimeError("broken\nin two"), "pyexiv2: broken in two"),
        ("pyexiv2.ImageData.get_bytes", RuntimeError("broken\nin two"), "pyexiv2: broken in two"),
        ("pathlib.Path.replace", FULL, FULL.strerror),
        ("os.fsync", FULL, FULL.strerror),
        ("shutil.copystat", FULL, FULL.strerror),
        ("os.fsync", KeyboardInterrupt(), None),
    ],
)
def test_a_failure_midway(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
    expected: str | None,
) -> None:
    use_only(monkeypatch, "pyexiv2")
    path = make_tagged(tmp_path / "x.jpg")
    before = path.read_bytes()
    monkeypatch.setattr(function, raiser(error))
    if expected is None:
        with pytest.raises(KeyboardInterrupt):
            write_description(path, TEXT)
    else:
        assert reason(path) == expected
    assert path.read_bytes() == before and names(tmp_path) == ["x.jpg"]


@pytest.mark.parametrize("change", ["pixel", "orientation", "profile", "half", "nothing"])
def test_a_tool_that_errs_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path, other = make_tagged(tmp_path / "x.png"), tmp_path / "other" / "x.png"
    other.parent.mkdir()
    make_tagged(other, exif(3) if change == "orientation" else None)
    with Image.open(other) as image:
        image.load()
    if change == "pixel":
        image.putpixel((5, 5), (0, 0, 0, 0))
    if change in ("pixel", "profile"):
        kept = {} if change == "profile" else {"icc_profile": image.info["icc_profile"]}
        image.info.pop("icc_profile")
        image.save(other, exif=exif(), **kept)
    if change != "nothing":
        write_description(other, TEXT)
    written = other.read_bytes()
    wrong = written[: len(written) // 2] if change == "half" else written
    tool = next(tool for tool in TOOLS if tool.available())
    monkeypatch.setattr(metadata, "TOOLS", (tool._replace(write=lambda *_: wrong),))
    expected = {"half": "cannot be read", "nothing": "does not read back"}
    assert expected.get(change, "would look different") in reason(path)


def test_lost_metadata_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_only(monkeypatch, "pyexiv2")
    pyexiv2 = pytest.importorskip("pyexiv2", reason="pyexiv2 is not installed")
    path = make_tagged(tmp_path / "x.jpg")
    modify = pyexiv2.ImageData.modify_xmp

    def careless(image: Any, data: dict[str, Any], **options: Any) -> None:
        image.clear_thumbnail()
        modify(image, data, **options)

    monkeypatch.setattr("pyexiv2.ImageData.modify_xmp", careless)
    assert "would be changed or lost" in reason(path)


def test_another_program_writes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, newer = draw(tmp_path / "x.jpg"), draw(tmp_path / "newer.jpg", 5)
    copystat = metadata.shutil.copystat

    def interfere(source: Path, target: Path) -> None:
        path.write_bytes(newer.read_bytes())
        copystat(source, target)

    monkeypatch.setattr(metadata.shutil, "copystat", interfere)
    with pytest.raises(MetadataError, match="changed by another program"):
        write_description(path, TEXT)
    assert path.read_bytes() == newer.read_bytes()
    assert names(tmp_path) == ["newer.jpg", "x.jpg"]


@linux_only
def test_read_only(tmp_path: Path) -> None:
    path = draw(tmp_path / "folder" / "x.jpg")
    path.chmod(0o444)
    assert reason(path) == "the file is read-only"
    path.chmod(0o644)
    path.parent.chmod(0o555)
    try:
        assert reason(path) == "its folder is read-only"
    finally:
        path.parent.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
def test_the_owner_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "x.jpg")
    os.chown(path, 12345, 54321)
    path.chmod(0o4640)
    old = status(path)
    write_description(path, TEXT)
    assert status(path) == old
    monkeypatch.setattr(os, "chown", raiser(PermissionError()))
    assert reason(path, "another") == "it belongs to another user or group"


@linux_only
def test_what_a_killed_process_left_or_somebody_laid_there(tmp_path: Path) -> None:
    path, precious = draw(tmp_path / "x.jpg"), tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / ".x.jpg.tmp").symlink_to(precious)
    write_description(path, TEXT)
    assert precious.read_text() == "precious"
    assert names(tmp_path) == ["precious", "x.jpg"]


def test_formats_without_metadata(tmp_path: Path) -> None:
    for extension in ("bmp", "ppm", "tga"):
        path = draw(tmp_path / f"x.{extension}")
        assert read_description(path) is None
        format = extension.upper()
        assert reason(path) == f"a file of format {format} cannot carry a description"


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tif"])
def test_several_frames(tmp_path: Path, extension: str) -> None:
    needs(extension)
    path = tmp_path / f"x.{extension}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert reason(path) == "it has several frames or pages"


def test_no_images(tmp_path: Path) -> None:
    empty, text, half = tmp_path / "empty.jpg", tmp_path / "text.jpg", tmp_path / "half.jpg"
    empty.touch()
    text.write_text("<html>404 Not Found</html>")
    photograph(400, 300).save(half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (tmp_path / "folder.jpg").mkdir()
    assert reason(empty) == "empty file"
    assert reason(text) == "not a supported image"
    assert "truncated" in reason(half)
    assert reason(tmp_path / "folder.jpg") == "it is a folder"
    assert reason(tmp_path / "missing.jpg") == "no such file"
    assert reason(draw(tmp_path / "x.jpg"), " ") == "the description is empty"
    assert "longer than 2,000 bytes" in reason(tmp_path / "x.jpg", "狗" * 667)
    for path in (empty, text, half):
        assert read_description(path) is None
    with pytest.raises(MetadataError, match="no such file"):
        read_description(tmp_path / "missing.jpg")


@linux_only
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(MetadataError, match="not a file"):
        write_description(tmp_path / "x.jpg", TEXT)
    with pytest.raises(MetadataError, match="not a file"):
        read_description(tmp_path / "x.jpg")


@pytest.mark.parametrize("data", ["<?xml version='1.0'?><OME/>", '{"shape": [3, 4]}', "ImageJ=1.5"])
def test_a_microscopes_data_are_not_written_over(tmp_path: Path, data: str) -> None:
    path = tmp_path / "x.tif"
    photograph().save(path, description=data)
    assert reason(path) == "its description holds data of the program that made it"


# Reading


def test_xmp_before_iptc_before_exif(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"

    def save(xmp: bool, iptc: bytes | None, description: bytes | None) -> str | None:
        buffer = io.BytesIO()
        packet = tagged_images.XMP if xmp else b""
        photograph().save(buffer, "JPEG", exif=exif(description=description), xmp=packet)
        content = buffer.getvalue()
        segment = iptc_segment([(2, 120, iptc)]) if iptc is not None else b""
        path.write_bytes(content[:2] + segment + content[2:])
        return read_description(path)

    assert save(True, b"from IPTC", b"from EXIF") == "Ein Hund"
    assert save(False, b"from IPTC", b"from EXIF") == "from IPTC"
    assert save(False, b"  ", b"from EXIF") == "from EXIF"
    assert save(False, b"Stra\xdfe", None) == "Straße"
    assert save(False, None, "Straße 狗".encode()) == "Straße 狗"
    assert save(False, None, b"OLYMPUS DIGITAL CAMERA         ") is None
    assert save(False, b"SONY DSC", b"Grandmother's house") == "Grandmother's house"
    assert save(False, None, None) is None


def test_what_cameras_write_counts_as_no_description() -> None:
    by_cameras = """
        |   \0|OLYMPUS DIGITAL CAMERA         |SONY DSC|Exif_JPEG_PICTURE|cof|default|- - -
        |KONICA MINOLTA DIGITAL CAMERA|KODAK Digital Still Camera|<Samsung>|SAMSUNG|Untitled
        |DCIM\\100MEDIA\\DJI_0001.JPG|IMG_1234.jpg"""
    by_people = """dog|a person with a digital camera|Canon in D|my Nikon|chó|狗|😀 2|Image of Anna
        |see IMG_1234.jpg|Olympus Mons|2019"""
    assert [text for text in by_cameras.split("|") if not is_filler(text)] == []
    assert [text for text in by_people.split("|") if is_filler(text)] == []


# What is installed


def test_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_tools, "load_pyexiv2", lambda: None)
    monkeypatch.setattr(metadata_tools, "find_exiftool", lambda: None)
    with pytest.raises(UserError) as caught:
        check_available()
    assert "pip install pyexiv2" in str(caught.value) and "exiftool" in str(caught.value)
    assert "\n" not in str(caught.value)
    path = draw(tmp_path / "x.jpg")
    expected = "a file of format JPEG needs pyexiv2 or exiftool, which is not installed"
    assert reason(path) == expected
    with pytest.raises(MetadataError, match=expected):
        read_description(path)
    gif = draw(tmp_path / "x.gif")
    assert reason(gif) == "a file of format GIF needs exiftool, which is not installed"


def test_a_pyexiv2_that_does_not_load_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "pyexiv2":
            raise RuntimeError("not for this system")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert metadata_tools.load_pyexiv2.__wrapped__() is None


@linux_only
def test_an_exiftool_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "exiftool"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat >/dev/null\necho 'Error: out of order - -' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(metadata_tools, "find_exiftool", lambda: str(program))
    path = tmp_path / "x.gif"
    photograph().convert("P").save(path)
    assert reason(path) == "exiftool: Error: out of order"
