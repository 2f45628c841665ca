"""Descriptions in the metadata of an image's bytes, by pyexiv2 or by exiftool.

Both work from bytes to bytes, so that no name of a file, however odd, passes through them.
pyexiv2 takes milliseconds, exiftool a quarter of a second, but writes more formats.
"""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types

    import pyexiv2

EXIFTOOL_SECONDS = 120
# Pillow's names of the formats in which IPTC is at home; elsewhere it is only kept in step.
IPTC_FORMATS = frozenset({"JPEG", "MPO"})
# Where it may stand.
IPTC_POSSIBLE = IPTC_FORMATS | {"PNG", "TIFF", "JPEG2000"}
# XMP is all that a GIF carries.
WITHOUT_EXIF = frozenset({"GIF"})

XMP, EXIF = "Xmp.dc.description", "Exif.Image.ImageDescription"
IPTC, IPTC_CHARACTERS = "Iptc.Application2.Caption", "Iptc.Envelope.CharacterSet"
DEFAULT_LANGUAGE = 'lang="x-default"'
UTF_8_MARK = "\x1b%G"  # ISO 2022's change to UTF-8, by which IPTC tells it
# What says where in the file something lies, or holds a copy of what has been changed.
POSITIONS = re.compile(
    r"(Offsets?|Start|Pointer|ExifTag|GPSTag|InteroperabilityTag|SubIFDs|MakerNote"
    r"|JPEGInterchangeFormat|XMLPacket|IPTCNAA|ImageResources)$"
)


class ToolError(Exception):
    """A tool cannot do it with this image; the text is the reason."""


@dataclass(frozen=True)
class Descriptions:
    """What an image's metadata say that it shows; None where they say nothing."""

    xmp: str | None
    iptc: str | None
    exif: str | None


@dataclass(frozen=True)
class Tool:
    """A tool for metadata, here or missing.

    Attributes:
        name: what the user knows it by.
        formats: Pillow's names of the formats that it writes.
        available: tells whether it is installed.
        read: takes a file's bytes.
        write: takes a file's bytes, its format and a text; gives the bytes with the text.
            Both raise ToolError.
    """

    name: str
    formats: frozenset[str]
    available: Callable[[], bool]
    read: Callable[[bytes], Descriptions]
    write: Callable[[bytes, str, str], bytes]


# pyexiv2


@functools.cache
def load_pyexiv2() -> types.ModuleType | None:
    """Import pyexiv2 where it is installed and fits the system.

    Its log is switched off: it would print on standard output, and an error logged for one
    image would be raised for the next. What it does is checked afterwards. Each of its calls
    holds Python's lock from start to end, so threads cannot meet within it.
    """
    try:
        import pyexiv2
    except (ImportError, OSError, RuntimeError):  # not there, or not for this system
        return None
    pyexiv2.set_log_level(4)
    return pyexiv2


@contextmanager
def _opened(data: bytes) -> Iterator[pyexiv2.ImageData]:
    library = load_pyexiv2()
    assert library is not None
    try:
        image = library.ImageData(data)
        try:
            yield image
        finally:
            image.close()
    except (ToolError, MemoryError):
        raise
    except Exception as error:
        # It raises RuntimeError for whatever Exiv2 reports, and UnicodeDecodeError of its own.
        raise ToolError(str(error)) from error


def read_with_pyexiv2(data: bytes) -> Descriptions:
    """Read the descriptions of a file's bytes.

    Raises:
        ToolError: the metadata cannot be read.
    """
    with _opened(data) as image:
        xmp = image.read_xmp().get(XMP)
        iptc = image.read_iptc(encoding="latin-1").get(IPTC)
        exif = image.read_exif(encoding="latin-1").get(EXIF)
    if isinstance(xmp, dict):
        xmp = xmp.get(DEFAULT_LANGUAGE, next(iter(xmp.values()), None))
    return Descriptions(_first(xmp), _decode(_first(iptc)), _decode(_first(exif)))


def _first(value: Any) -> str | None:
    """Take the first value of a tag that may stand there several times."""
    return next(iter(value), None) if isinstance(value, list) else value


def _decode(text: str | None) -> str | None:
    """Make text of bytes that came as Latin-1: they are UTF-8, or else old Windows text."""
    if text is None:
        return None
    content = text.encode("latin-1")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def write_with_pyexiv2(data: bytes, format: str, text: str) -> bytes:
    """Write a description into a copy of a file's bytes, and check that the rest is kept.

    Raises:
        ToolError: it cannot, or other metadata would be lost or changed.
    """
    with _opened(data) as image:
        before = _others(image)
        image.modify_exif({EXIF: text})
        languages = image.read_xmp().get(XMP)
        languages = languages if isinstance(languages, dict) else {}
        image.modify_xmp({XMP: {**languages, DEFAULT_LANGUAGE: text}})
        iptc = image.read_iptc(encoding="latin-1")
        if iptc or format in IPTC_FORMATS:
            image.modify_iptc({**_as_utf_8(iptc), IPTC_CHARACTERS: UTF_8_MARK, IPTC: text})
        written = image.get_bytes()
    with _opened(written) as image:
        after = _others(image)
    changed = [key for key, value in before.items() if after.get(key) != value]
    if changed:
        raise ToolError(f"{changed[0]} would be changed or lost")
    return written


def _as_utf_8(iptc: Mapping[str, Any]) -> dict[str, Any]:
    """Give the IPTC texts that the mark for UTF-8 would garble, as text to be written anew."""
    if iptc.get(IPTC_CHARACTERS) == UTF_8_MARK:
        return {}
    texts = {key: _decoded(value) for key, value in iptc.items()}
    return {key: value for key, value in texts.items() if not str(value).isascii()}


def _decoded(value: Any) -> Any:
    return [_decode(item) for item in value] if isinstance(value, list) else _decode(value)


def _others(image: pyexiv2.ImageData) -> dict[str, Any]:
    """Read all that must stay as it is: EXIF, XMP, IPTC, colour profile, thumbnail, comment."""
    xmp = image.read_xmp()
    languages = xmp.pop(XMP, None)
    if isinstance(languages, dict):
        xmp |= {f"{XMP} {key}": value for key, value in languages.items()}
        xmp.pop(f"{XMP} {DEFAULT_LANGUAGE}", None)
    iptc = image.read_iptc(encoding="latin-1")
    exif = image.read_exif(encoding="latin-1")
    return {
        **xmp,
        **{
            key: _decoded(value)
            for key, value in iptc.items()
            if key not in (IPTC, IPTC_CHARACTERS)
        },
        **{key: value for key, value in exif.items() if key != EXIF and not POSITIONS.search(key)},
        "the colour profile": image.read_icc(),
        "the thumbnail": image.read_thumbnail(),
        "the comment": image.read_comment(encoding="latin-1").rstrip("\0"),
    }


# exiftool


def find_exiftool() -> str | None:
    """Find the program exiftool on the PATH."""
    return shutil.which("exiftool")


def _exiftool(data: bytes, *arguments: str) -> bytes:
    """Run exiftool on a file's bytes; the user's own configuration of it is not used."""
    program = find_exiftool()
    assert program is not None
    # "-E" takes character references in arguments, so that no locale touches the text.
    command = [program, "-config", "", "-E", "-q", "-q", *arguments, "-"]
    try:
        result = subprocess.run(command, input=data, capture_output=True, timeout=EXIFTOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(str(error)) from error
    if result.returncode or not result.stdout:
        complaint = result.stderr.decode("utf-8", "replace").strip() or "no result"
        raise ToolError(complaint.splitlines()[-1].removesuffix(" - -"))
    return result.stdout


def _tags(data: bytes, *tags: str) -> dict[str, str]:
    """Read tags with exiftool, numbers as they are written."""
    output = _exiftool(data, "-j", *tags).decode("utf-8", "replace")
    try:
        (tags_found,) = json.loads(output, parse_int=str, parse_float=str)
    except ValueError as error:
        raise ToolError("its answer cannot be read") from error
    return {
        # "-E" works on what is printed, too.
        key: html.unescape(value) if isinstance(value, str) else str(value)
        for key, value in tags_found.items()
        if key != "SourceFile"
    }


def read_with_exiftool(data: bytes) -> Descriptions:
    """Read the descriptions of a file's bytes.

    Raises:
        ToolError: the metadata cannot be read.
    """
    tags = _tags(data, "-XMP-dc:Description*", "-IPTC:Caption-Abstract", "-IFD0:ImageDescription")
    iptc, exif = tags.pop("Caption-Abstract", None), tags.pop("ImageDescription", None)
    xmp = tags.get("Description", next(iter(tags.values()), None))
    return Descriptions(xmp, iptc, exif)


def write_with_exiftool(data: bytes, format: str, text: str) -> bytes:
    """Write a description into a copy of a file's bytes.

    Raises:
        ToolError: it cannot.
    """
    escaped = html.escape(text).encode("ascii", "xmlcharrefreplace").decode()
    escaped = escaped.replace("\n", "&#10;")
    arguments = [f"-XMP-dc:Description-x-default={escaped}"]
    if format not in WITHOUT_EXIF:
        arguments.append(f"-IFD0:ImageDescription={escaped}")
    iptc = _tags(data, "-IPTC:all") if format in IPTC_POSSIBLE else {}
    if iptc or format in IPTC_FORMATS:
        if iptc.get("CodedCharacterSet") != "UTF8":
            # The texts that stand there are read, and written anew as UTF-8.
            arguments += ["-tagsfromfile", "@", "-IPTC:all"] if iptc else []
            arguments.append("-IPTC:CodedCharacterSet=UTF8")
        arguments.append(f"-IPTC:Caption-Abstract={escaped}")
    return _exiftool(data, *arguments, "-o", "-")


# What each writes was found by trying: exiv2 0.28 and exiftool 12.57.
_BOTH = frozenset({"JPEG", "MPO", "PNG", "WEBP", "TIFF", "JPEG2000"})
TOOLS = (
    Tool(
        *("pyexiv2", _BOTH, lambda: load_pyexiv2() is not None),
        *(read_with_pyexiv2, write_with_pyexiv2),
    ),
    Tool(
        *("exiftool", _BOTH | {"HEIF", "AVIF", "GIF"}, lambda: find_exiftool() is not None),
        *(read_with_exiftool, write_with_exiftool),
    ),
)
