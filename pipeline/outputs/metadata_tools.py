"""The two tools that write descriptions into an image's metadata: pyexiv2 and exiftool.

Both work on bytes in memory, so they never see file names. pyexiv2 takes milliseconds;
exiftool takes a quarter of a second, but writes more formats.
"""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import types

    import pyexiv2

EXIFTOOL_SECONDS = 120
# Pillow's names of the formats that always get an IPTC caption, and of those that may have IPTC,
# where it is only kept in sync.
IPTC_FORMATS = frozenset({"JPEG", "MPO"})
IPTC_POSSIBLE = IPTC_FORMATS | {"PNG", "TIFF", "JPEG2000"}
WITHOUT_EXIF = frozenset({"GIF"})

XMP, EXIF = "Xmp.dc.description", "Exif.Image.ImageDescription"
IPTC, IPTC_CHARACTERS = "Iptc.Application2.Caption", "Iptc.Envelope.CharacterSet"
DEFAULT_LANGUAGE = 'lang="x-default"'
UTF_8_MARK = "\x1b%G"  # ISO 2022's escape to UTF-8, by which IPTC declares it
# EXIF tags that hold file offsets, or copies of changed values.
POSITIONS = re.compile(
    r"(Offsets?|Start|Pointer|ExifTag|GPSTag|InteroperabilityTag|SubIFDs|MakerNote"
    r"|JPEGInterchangeFormat|XMLPacket|IPTCNAA|ImageResources)$"
)


class ToolError(Exception):
    """A tool cannot handle this image; the message is the reason."""


class Descriptions(NamedTuple):
    """The descriptions in an image's metadata; None where there is none."""

    xmp: str | None
    iptc: str | None
    exif: str | None


class Tool(NamedTuple):
    """A tool for metadata, installed or not.

    Attributes:
        formats: Pillow's names of the formats that it writes.
        read: takes a file's bytes; raises ToolError.
        write: takes a file's bytes, its format and a text, and returns the bytes with the text;
            raises ToolError.
    """

    name: str
    formats: frozenset[str]
    available: Callable[[], bool]
    read: Callable[[bytes], Descriptions]
    write: Callable[[bytes, str, str], bytes]


@functools.cache
def load_pyexiv2() -> types.ModuleType | None:
    """Import pyexiv2 if it is installed and works on this system."""
    try:
        import pyexiv2
    except (ImportError, OSError, RuntimeError):  # not installed, or not for this system
        return None
    # Its log goes to standard output, and raises one image's error while handling the next.
    pyexiv2.set_log_level(4)
    return pyexiv2


@contextmanager
def _opened(data: bytes) -> Iterator[pyexiv2.ImageData]:
    library = load_pyexiv2()
    assert library is not None
    try:
        with library.ImageData(data) as image:
            yield image
    except (ToolError, MemoryError):
        raise
    except Exception as error:  # RuntimeError from Exiv2, UnicodeDecodeError from pyexiv2
        raise ToolError(str(error)) from error


def _read_with_pyexiv2(data: bytes) -> Descriptions:
    with _opened(data) as image:
        xmp = image.read_xmp().get(XMP)
        iptc = _decode(image.read_iptc(encoding="latin-1").get(IPTC))
        exif = _decode(image.read_exif(encoding="latin-1").get(EXIF))
    if isinstance(xmp, dict):
        xmp = xmp.get(DEFAULT_LANGUAGE, next(iter(xmp.values()), None))
    # A tag may occur several times.
    return Descriptions(
        *(next(iter(v), None) if isinstance(v, list) else v for v in (xmp, iptc, exif))
    )


def _decode(value: Any) -> Any:
    """Decode text, or a list of texts, that was read as Latin-1: UTF-8, else Windows-1252."""
    if value is None or isinstance(value, list):
        return value and [_decode(item) for item in value]
    content = value.encode("latin-1")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _write_with_pyexiv2(data: bytes, format: str, text: str) -> bytes:
    with _opened(data) as image:
        before = _others(image)
        image.modify_exif({EXIF: text})
        languages = image.read_xmp().get(XMP)
        languages = languages if isinstance(languages, dict) else {}
        image.modify_xmp({XMP: {**languages, DEFAULT_LANGUAGE: text}})
        iptc = image.read_iptc(encoding="latin-1")
        if iptc or format in IPTC_FORMATS:
            # The UTF-8 mark would garble texts in another encoding, so those are rewritten.
            utf_8 = iptc.get(IPTC_CHARACTERS) == UTF_8_MARK
            texts = {} if utf_8 else {key: _decode(value) for key, value in iptc.items()}
            again = {key: value for key, value in texts.items() if not str(value).isascii()}
            image.modify_iptc({**again, IPTC_CHARACTERS: UTF_8_MARK, IPTC: text})
        written = image.get_bytes()
    with _opened(written) as image:
        after = _others(image)
    changed = [key for key, value in before.items() if after.get(key) != value]
    if changed:
        raise ToolError(f"{changed[0]} would be changed or lost")
    return written


def _others(image: pyexiv2.ImageData) -> dict[str, Any]:
    """Read everything that must not change: EXIF, XMP, IPTC, profile, thumbnail, comment."""
    xmp = image.read_xmp()
    languages = xmp.pop(XMP, None)
    if isinstance(languages, dict):
        languages.pop(DEFAULT_LANGUAGE, None)
        xmp |= {f"{XMP} {key}": value for key, value in languages.items()}
    iptc = {key: _decode(v) for key, v in image.read_iptc(encoding="latin-1").items()}
    exif = image.read_exif(encoding="latin-1")
    return {
        **xmp,
        **{key: value for key, value in iptc.items() if key not in (IPTC, IPTC_CHARACTERS)},
        **{key: value for key, value in exif.items() if key != EXIF and not POSITIONS.search(key)},
        "the colour profile": image.read_icc(),
        "the thumbnail": image.read_thumbnail(),
        "the comment": image.read_comment(encoding="latin-1").rstrip("\0"),
    }


def find_exiftool() -> str | None:
    """Return the path of the program exiftool."""
    return shutil.which("exiftool")


def _exiftool(data: bytes, *arguments: str) -> bytes:
    """Run exiftool on a file's bytes, ignoring the user's exiftool configuration."""
    program = find_exiftool()
    assert program is not None
    # "-E" reads and prints character references, so the text does not depend on the locale.
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
    """Read tags with exiftool; numbers stay strings."""
    output = _exiftool(data, "-j", *tags).decode("utf-8", "replace")
    try:
        (found,) = json.loads(output, parse_int=str, parse_float=str)
    except ValueError as error:
        raise ToolError("its answer cannot be read") from error
    return {k: html.unescape(str(value)) for k, value in found.items() if k != "SourceFile"}


def _read_with_exiftool(data: bytes) -> Descriptions:
    tags = _tags(data, "-XMP-dc:Description*", "-IPTC:Caption-Abstract", "-IFD0:ImageDescription")
    iptc, exif = tags.pop("Caption-Abstract", None), tags.pop("ImageDescription", None)
    return Descriptions(tags.get("Description", next(iter(tags.values()), None)), iptc, exif)


def _write_with_exiftool(data: bytes, format: str, text: str) -> bytes:
    escaped = html.escape(text).encode("ascii", "xmlcharrefreplace").decode()
    escaped = escaped.replace("\n", "&#10;")
    arguments = [f"-XMP-dc:Description-x-default={escaped}"]
    if format not in WITHOUT_EXIF:
        arguments.append(f"-IFD0:ImageDescription={escaped}")
    iptc = _tags(data, "-IPTC:all") if format in IPTC_POSSIBLE else {}
    if iptc or format in IPTC_FORMATS:
        if iptc.get("CodedCharacterSet") != "UTF8":
            # Existing texts are read and rewritten as UTF-8.
            arguments += ["-tagsfromfile", "@", "-IPTC:all"] if iptc else []
            arguments.append("-IPTC:CodedCharacterSet=UTF8")
        arguments.append(f"-IPTC:Caption-Abstract={escaped}")
    return _exiftool(data, *arguments, "-o", "-")


# The formats that each can write, as tested with exiv2 0.28 and exiftool 12.57.
_BOTH = frozenset({"JPEG", "MPO", "PNG", "WEBP", "TIFF", "JPEG2000"})

TOOLS = (
    Tool(
        name="pyexiv2",
        formats=_BOTH,
        available=lambda: load_pyexiv2() is not None,
        read=_read_with_pyexiv2,
        write=_write_with_pyexiv2,
    ),
    Tool(
        name="exiftool",
        formats=_BOTH | {"HEIF", "AVIF", "GIF"},
        available=lambda: find_exiftool() is not None,
        read=_read_with_exiftool,
        write=_write_with_exiftool,
    ),
)
