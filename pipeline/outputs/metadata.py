"""Captions in the images' own metadata, where photo programs show and search them.

An image is rewritten beside itself and replaced only when its pixels proved to be the same
and the description reads back.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from PIL import Image

# IPTC's limit for a caption (IIM 4.2, dataset 2:120).
MAXIMUM_BYTES = 2000
# What cameras and their programs put where a description belongs: these words, alone or together.
FILLER_WORDS = frozenset(
    "agfa canon casio fuji fujifilm hp jenoptik kodak konica leica minolta nikon olympus panasonic "
    "pentax polaroid ricoh samsung sanyo sigma sony vivitar "
    "camera default digital dsc exif_jpeg_image image jpeg photo image still untitled "
    "bty cof dav edf hdr mde nor oznor rbt rhdr sdr smart_cuv vsco".split()
)
FILE_NAME = re.compile(r"\S+\.(jpe?g|tiff?|png|heic|dng)", re.IGNORECASE)
# How the descriptions begin that microscopes' programs read again: OME, tifffile, ImageJ.
DATA = ("<", "{", "ImageJ=", "SCIFIO=")


class MetadataError(Exception):
    """A description that cannot be written or read; the text is the reason, without the name."""


@dataclass(frozen=True)
class Appearance:
    """What is seen of an image, and what Pillow finds in it that the tools may not know.

    Attributes:
        frames: a digest of each frame's pixels.
        profile: the colour profile.
        orientation: EXIF's number for how to turn it.
        notes: comments, texts and other programs' segments, sorted.
    """

    frames: tuple[str, ...]
    profile: bytes | None
    orientation: int
    notes: tuple[tuple[str, str], ...]


def check_available() -> None:
    """Make sure that something is installed that writes metadata.

    Raises:
        UserError: neither pyexiv2 nor exiftool is.
    """
    if not any(tool.available() for tool in TOOLS):
        raise UserError(
            "to write into images, install pyexiv2 (pip install pyexiv2) or the program "
            "exiftool (https://exiftool.org)"
        )


def read_description(path: Path) -> str | None:
    """Read what an image's metadata say that it shows: XMP, else IPTC, else EXIF.

    What a camera or its program puts there describes nothing and counts as none: words such
    as "OLYMPUS DIGITAL CAMERA", "SONY DSC" and "Exif_JPEG_PICTURE", and names of files. It
    does so wherever it stands, since programs copy it from EXIF to XMP. All else may be a
    person's own words, and is returned.

    Returns:
        The text; None where there is none, and where the file is no image or of a format
        that carries none.

    Raises:
        MetadataError: the file cannot be opened, or its format needs a tool that is missing.
    """
    try:
        _check_regular(path)
        data = path.read_bytes()
    except OSError as error:
        raise MetadataError(_reason(error)) from error
    try:
        format, _ = _format(path)
    except images.ImageError:
        return None
    if not any(format in tool.formats for tool in TOOLS):
        return None
    for tool in _tools(format):
        try:
            found = tool.read(data)
        except ToolError:
            continue
        texts = [text for text in (found.xmp, found.iptc, found.exif) if text is not None]
        return next((text for text in texts if not is_filler(text)), None)
    return None


def is_filler(text: str) -> bool:
    """Tell whether a description was put there by a camera, or is empty."""
    text = text.strip(" \0\t\r\n")
    words = re.findall(r"\w+", text.lower())
    return FILLER_WORDS.issuperset(words) or FILE_NAME.fullmatch(text) is not None


def write_description(path: Path, text: str) -> None:
    """Write what an image shows into its metadata, and change nothing else of it.

    It becomes XMP's dc:description (x-default; other languages stay) and EXIF's
    ImageDescription (in a GIF, XMP alone), in a JPEG IPTC's Caption-Abstract too, in other
    formats where IPTC is there already. What stood there is replaced. Pixels, all other
    metadata, owner, permissions and the times of reading and changing are kept. Of a symbolic
    link the file that it points to is rewritten; of several hard links only the one named.

    Args:
        path: a JPEG, PNG, WebP, TIFF or JPEG 2000; with exiftool also a HEIC, AVIF or GIF.
        text: not empty, at most 2,000 bytes of UTF-8.

    Raises:
        MetadataError: that cannot be, and the file is as it was.
    """
    if not text.strip():
        raise MetadataError("the description is empty")
    if len(text.encode(errors="replace")) > MAXIMUM_BYTES:
        raise MetadataError(f"the description is longer than {MAXIMUM_BYTES:,} bytes")
    try:
        _rewrite(Path(os.path.realpath(path, strict=True)), text)
    except images.ImageError as error:
        raise MetadataError(str(error)) from error
    except OSError as error:
        raise MetadataError(_reason(error)) from error


def _rewrite(path: Path, text: str) -> None:
    status = _check_regular(path)
    if _is_read_only(path):
        raise MetadataError("the file is read-only")
    if _is_read_only(path.parent):
        raise MetadataError("its folder is read-only")
    data = path.read_bytes()
    format, frames = _format(path)
    tools = _tools(format)
    if frames > 1 and format != "MPO":  # phones add a second image to a JPEG: MPO
        raise MetadataError("it has several frames or pages")
    appearance = _appearance(path)
    reasons = []
    for tool in tools:
        try:
            if format == "TIFF" and (tool.read(data).exif or "").lstrip().startswith(DATA):
                raise MetadataError("its description holds data of the program that made it")
            written = tool.write(data, format, text)
            with _beside(path, written, status) as temporary:
                _check(temporary, tool, format, text, appearance)
            return
        except ToolError as error:
            reasons.append(f"{tool.name}: {' '.join(str(error).split())}")
    raise MetadataError("; ".join(reasons))


def _check_regular(path: Path) -> os.stat_result:
    """Keep off folders and pipes."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise MetadataError("it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise MetadataError("it is not a file")
    return status


def _is_read_only(path: Path) -> bool:
    """Tell whether nobody may write there, which does not hinder root, or not this user."""
    return not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK)


def _format(path: Path) -> tuple[str, int]:
    """Give Pillow's name of an image's format, and the number of frames."""
    with images.opened(path) as image:
        return image.format or "", getattr(image, "n_frames", 1)


def _tools(format: str) -> list[Tool]:
    """Choose the installed tools that write a format, the better one first."""
    able = [tool for tool in TOOLS if format in tool.formats]
    if not able:
        raise MetadataError(f"a file of format {format} cannot carry a description")
    tools = [tool for tool in able if tool.available()]
    if not tools:
        names = " or ".join(tool.name for tool in able)
        raise MetadataError(f"a file of format {format} needs {names}, which is not installed")
    return tools


def _appearance(path: Path) -> Appearance:
    with images.opened(path) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            digest = hashlib.blake2b(image.tobytes())
            digest.update(repr((image.mode, image.size, image.getpalette())).encode())
            digest.update(repr(image.info.get("transparency")).encode())
            frames.append(digest.hexdigest())
        image.seek(0)
        orientation = image.getexif().get(0x0112, 1)
        profile = image.info.get("icc_profile")
        return Appearance(tuple(frames), profile, orientation, _notes(image))


def _notes(image: Image.Image) -> tuple[tuple[str, str], ...]:
    """List a JPEG's segments and a PNG's texts, but those in which descriptions stand."""
    # The list of a second image's place (MPF) may move with it; its pixels are compared.
    segments = [
        (name, repr(content.rstrip(b"\0")))  # pyexiv2 ends comments with a zero
        for name, content in getattr(image, "applist", ())
        if name not in ("APP1", "APP13") and not content.startswith((b"ICC_PROFILE", b"MPF"))
    ]
    texts = getattr(image, "text", {}) if image.format == "PNG" else {}
    notes = [
        (key, str(value))
        for key, value in texts.items()
        if key != "XML:com.adobe.xmp" and not key.startswith("Raw profile type")
    ]
    return tuple(sorted(segments + notes))


def _check(path: Path, tool: Tool, format: str, text: str, appearance: Appearance) -> None:
    """Make sure that a rewritten image looks the same, and says what it should.

    Raises:
        ToolError: it does not.
    """
    try:
        now = _appearance(path)
    except images.ImageError as error:
        raise ToolError(f"the rewritten image cannot be read ({error})") from error
    if dataclasses.replace(now, notes=appearance.notes) != appearance:
        raise ToolError("the rewritten image would look different")
    if now != appearance:
        raise ToolError("a comment or another program's data would be lost")
    found = tool.read(path.read_bytes())
    if found != Descriptions(
        xmp=text,
        iptc=text if format in IPTC_FORMATS or found.iptc is not None else None,
        exif=None if format in WITHOUT_EXIF else text,
    ):
        raise ToolError("the description does not read back as it was written")


@contextmanager
def _beside(path: Path, content: bytes, status: os.stat_result) -> Iterator[Path]:
    """Write a temporary file beside ``path`` and, when the block ends well, move it there.

    It gets the owner, permissions, extended attributes and times of ``path``, which
    ``status`` tells as they were before it was read.
    """
    temporary = temporary_path(path)
    try:
        temporary.unlink(missing_ok=True)
        # A new file, never a link that somebody laid there, and for no other eyes meanwhile.
        temporary.touch(mode=0o600, exist_ok=False)
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
        own = temporary.stat()
        if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
            try:
                os.chown(temporary, status.st_uid, status.st_gid)
            except PermissionError as error:
                raise MetadataError("it belongs to another user or group") from error
        shutil.copystat(path, temporary)
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = path.stat()
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (
            *(status.st_ino, status.st_size, status.st_mtime_ns),
        ):
            raise MetadataError("it was changed by another program meanwhile")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if error.errno == errno.ELOOP:
        return "its symbolic links run in a circle"
    return error.strerror or str(error)
