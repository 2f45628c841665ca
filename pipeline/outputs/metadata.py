"""Captions in the images' own metadata, where photo software shows and searches them.

An image is replaced only if the rewritten one looks the same and its description reads back.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from pipeline.datasets import images
from pipeline.outputs.metadata_tools import (
    IPTC_FORMATS,
    TOOLS,
    WITHOUT_EXIF,
    Descriptions,
    Tool,
    ToolError,
)
from pipeline.utils.errors import UserError
from pipeline.utils.files import temporary_path

MAX_BYTES = 2000  # of an IPTC caption (IIM 4.2, dataset 2:120)
# What cameras and their software write as a description: these words, alone or combined.
FILLER_WORDS = frozenset(
    "agfa canon casio fuji fujifilm hp jenoptik kodak konica leica minolta nikon olympus panasonic "
    "pentax polaroid ricoh samsung sanyo sigma sony vivitar "
    "camera default digital dsc exif_jpeg_picture image jpeg photo picture still untitled "
    "bty cof dav edf hdr mde nor oznor rbt rhdr sdr smart_cuv vsco".split()
)
FILE_NAME = re.compile(r"\S+\.(jpe?g|tiff?|png|heic|dng)", re.IGNORECASE)
# Prefixes of descriptions that microscopy software parses: OME, tifffile, ImageJ.
DATA = ("<", "{", "ImageJ=", "SCIFIO=")
ORIENTATION = 0x0112
Appearance: TypeAlias = tuple[list[str], bytes | None, int]


class MetadataError(Exception):
    """A description cannot be written or read; the message is the reason, without a file name."""


def check_available() -> None:
    """Raise UserError unless a tool that writes metadata is installed."""
    if not any(tool.available() for tool in TOOLS):
        raise UserError(
            "to write into images, install pyexiv2 (pip install pyexiv2) or the program "
            "exiftool (https://exiftool.org)"
        )


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn errors of files and images into MetadataError."""
    try:
        yield
    except images.ImageError as error:
        raise MetadataError(str(error)) from error
    except FileNotFoundError as error:
        raise MetadataError("no such file") from error
    except OSError as error:
        loop = error.errno == errno.ELOOP
        reason = "its symbolic links run in a circle" if loop else error.strerror or str(error)
        raise MetadataError(reason) from error


@_reasons()
def read_description(path: Path) -> str | None:
    """Return the description in an image's metadata: XMP, else IPTC, else EXIF.

    Returns:
        The text; None if there is none or only a camera's filler (``is_filler``; programs copy it
        from EXIF to XMP), or if the file is not an image or its format has no metadata.

    Raises:
        MetadataError: the file cannot be opened, or its format needs a tool that is missing.
    """
    data, _ = _read(path)
    try:
        format, _ = _format(data)
    except images.ImageError:
        return None
    if not any(format in tool.formats for tool in TOOLS):
        return None
    for tool in _tools(format):
        try:
            found = tool.read(data)
        except ToolError:
            continue
        return next((text for text in found if text is not None and not is_filler(text)), None)
    return None


def is_filler(text: str) -> bool:
    """True if a description was written by a camera ("SONY DSC", a file name), or is empty."""
    text = text.strip(" \0\t\r\n")
    words = re.findall(r"\w+", text.lower())
    return FILLER_WORDS.issuperset(words) or FILE_NAME.fullmatch(text) is not None


@_reasons()
def write_description(path: Path, text: str) -> None:
    """Write a description into an image's metadata, and change nothing else.

    It goes into XMP dc:description (x-default; other languages stay), EXIF ImageDescription (not
    in a GIF) and IPTC Caption-Abstract (in a JPEG, and in any file that already has IPTC). Pixels,
    all other metadata, owner, permissions and times are kept. For a symbolic link the target is
    rewritten; of several hard links, only the one named.

    Args:
        path: a JPEG, PNG, WebP, TIFF or JPEG 2000; with exiftool also a HEIC, AVIF or GIF.
        text: not empty, at most 2,000 bytes of UTF-8.

    Raises:
        MetadataError: it cannot be written; the file is unchanged.
    """
    if not text.strip():
        raise MetadataError("the description is empty")
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise MetadataError(f"the description is longer than {MAX_BYTES:,} bytes")
    path = Path(os.path.realpath(path, strict=True))
    data, status = _read(path)
    for place, name in ((path, "the file"), (path.parent, "its folder")):
        # Root can write read-only files, but the owner does not want that.
        if not place.stat().st_mode & 0o222 or not os.access(place, os.W_OK):
            raise MetadataError(f"{name} is read-only")
    format, frames = _format(data)
    tools = _tools(format)
    if frames > 1 and format != "MPO":  # phones add a second image to a JPEG: MPO
        raise MetadataError("it has several frames or pages")
    appearance = _appearance(data)
    reasons = []
    for tool in tools:
        try:
            if format == "TIFF" and (tool.read(data).exif or "").lstrip().startswith(DATA):
                raise MetadataError("its description holds data of the program that made it")
            written = tool.write(data, format, text)
            _check(written, tool, format, text, appearance)
        except ToolError as error:
            reasons.append(f"{tool.name}: {' '.join(str(error).split())}")
        else:
            return _replace(path, written, status)
    raise MetadataError("; ".join(reasons))


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """Return the content and status of a file; refuse folders, and pipes, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        folder = stat.S_ISDIR(status.st_mode)
        raise MetadataError("it is a folder" if folder else "it is not a file")
    return path.read_bytes(), status


def _format(data: bytes) -> tuple[str, int]:
    """Return Pillow's name of an image's format, and the number of frames."""
    with images.opened(io.BytesIO(data)) as image:
        return image.format or "", getattr(image, "n_frames", 1)


def _tools(format: str) -> list[Tool]:
    """Return the installed tools that write a format, the better one first."""
    able = [tool for tool in TOOLS if format in tool.formats]
    if not able:
        raise MetadataError(f"a file of format {format} cannot carry a description")
    tools = [tool for tool in able if tool.available()]
    if not tools:
        names = " or ".join(tool.name for tool in able)
        raise MetadataError(f"a file of format {format} needs {names}, which is not installed")
    return tools


def _appearance(data: bytes) -> Appearance:
    """Return how an image looks: a digest of each frame, colour profile, EXIF orientation."""
    with images.opened(io.BytesIO(data)) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            digest = hashlib.blake2b(image.tobytes())
            digest.update(repr((image.mode, image.size, image.getpalette())).encode())
            digest.update(repr(image.info.get("transparency")).encode())
            frames.append(digest.hexdigest())
        image.seek(0)
        orientation = image.getexif().get(ORIENTATION, 1)
        return frames, image.info.get("icc_profile"), orientation


def _check(data: bytes, tool: Tool, format: str, text: str, appearance: Appearance) -> None:
    """Raise ToolError unless a rewritten image looks the same and has the description."""
    try:
        now = _appearance(data)
    except images.ImageError as error:
        raise ToolError(f"the rewritten image cannot be read ({error})") from error
    if now != appearance:
        raise ToolError("the rewritten image would look different")
    found = tool.read(data)
    with_iptc = format in IPTC_FORMATS or found.iptc is not None
    exif = None if format in WITHOUT_EXIF else text
    if found != Descriptions(text, text if with_iptc else None, exif):
        raise ToolError("the description does not read back as it was written")


def _replace(path: Path, content: bytes, status: os.stat_result) -> None:
    """Replace a file; keep the owner, permissions, extended attributes and times of ``status``."""
    temporary = temporary_path(path)
    try:
        temporary.unlink(missing_ok=True)
        # Create a new file, never follow a planted link, and keep it private until it is moved.
        temporary.touch(mode=0o600, exist_ok=False)
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        own = temporary.stat()
        if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
            try:
                os.chown(temporary, status.st_uid, status.st_gid)
            except PermissionError as error:
                raise MetadataError("it belongs to another user or group") from error
        shutil.copystat(path, temporary)
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = path.stat()
        compared = ("st_ino", "st_size", "st_mtime_ns")
        if any(getattr(now, name) != getattr(status, name) for name in compared):
            raise MetadataError("it was changed by another program meanwhile")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
