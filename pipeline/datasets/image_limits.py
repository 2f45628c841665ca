"""What an image file may be before anything of it is decoded: a few bytes can ask for hours.

Pillow refuses more than 179 million pixels by the header (``PIL.Image.MAX_IMAGE_PIXELS``). The
limits here are for what gets round that.
"""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.utils.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of what is opened, the commonest first; HEIF is its plugin's. Pillow knows thirty
# more, among them EPS, which it gives to Ghostscript, a whole programming language. AVIF comes
# before HEIF, whose plugin takes every file of the brand mif1 and cannot decode AV1.
FORMATS = "JPEG PNG WEBP GIF AVIF HEIF TIFF BMP JPEG2000 PPM TGA".split()
# WebP, AVIF and HEIC are read whole.
LARGEST_FILE = 1 << 30
# That of JPEG and GIF. Rows of millions of pixels take Pillow's resampling many times longer.
MAX_SIDE = 65_535
# Pixels of what is decoded one at a time, and what some decoders are never asked for.
LARGE = 1 << 25
# A progressive JPEG has about ten. Each takes a walk over all pixels, and 10 bytes of file.
MAX_SCANS = 100

JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
START, END, START_OF_SCAN, TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF 6.0, section 15


def checked_file(path: Path) -> Path | io.BytesIO:
    """Make sure that a file can be given to Pillow; a JPEG comes back read.

    Raises:
        ImageError: it is a pipe or a device, which may never end, or too large; or see
            ``checked_content``.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ImageError("not a file")
    if status.st_size > LARGEST_FILE:
        raise ImageError(f"{status.st_size:,} bytes, more than any image that is read here")
    with path.open("rb") as file:
        if file.read(2) != b"\xff\xd8":
            return path
        return checked_content(b"\xff\xd8" + file.read())


def checked_content(content: bytes) -> io.BytesIO:
    """Make sure that an image's bytes can be given to Pillow.

    Raises:
        ImageError: it is a JPEG of very many scans.
    """
    if content.startswith(b"\xff\xd8") and _scans(content) > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
    return io.BytesIO(content)


def _scans(content: bytes) -> int:
    """Count a JPEG's scans (ITU-T T.81, annex B), up to one more than are allowed."""
    count, position = 0, 2
    while count <= MAX_SCANS and (found := JPEG_MARKER.search(content, position)):
        marker, position = content[found.start() + 1], found.end()
        if marker == END:
            break
        count += marker == START_OF_SCAN
        if marker not in (START, TEMPORARY):
            position += max(2, int.from_bytes(content[position : position + 2], "big"))
    return count


def check_header(image: Image.Image) -> None:
    """Make sure that an image that Pillow has opened can be decoded.

    Raises:
        ImageError: a side is too long, or its format has a way to make it far larger than it is.
    """
    from PIL import Image

    if max(image.size) > MAX_SIDE:
        raise ImageError(f"a side of {max(image.size):,} pixels; at most {MAX_SIDE:,} are read")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    # libtiff decodes whole tiles, however little of them is in the image.
    if tile > LARGE:
        raise ImageError(f"tiles of {tile:,} pixels; at most {LARGE:,} are read")
    # Those written in Python add pixel to pixel, half a microsecond each.
    decoders = {tile.codec_name for tile in getattr(image, "tile", ())}
    if image.width * image.height > LARGE and decoders & Image.DECODERS.keys():
        raise ImageError(f"more than {LARGE:,} pixels in a form that takes very long to decode")
