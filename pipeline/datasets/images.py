"""Decode images and resize them to InceptionV3's input square.

Every stage reads images through this module, so an image looks the same to all of them. Pillow
releases the GIL while it decodes and resizes, so threads can decode while the network runs.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from pipeline.utils.errors import ImageError
from pipeline.utils.threads import prefetch

if TYPE_CHECKING:
    import numpy
    from PIL import Image

IMAGE_EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .jp2 .j2k .jpx .png .apng .webp .heic .heif .hif .avif .gif "
    ".tif .tiff .bmp .tga .ppm .pgm .pbm .pnm".split()
)
# Formats to open, by Pillow's names, most common first; HEIF needs a plugin. Pillow knows thirty
# more, including EPS, which starts Ghostscript. AVIF comes before HEIF, whose plugin accepts every
# file of brand mif1 but cannot decode AV1.
FORMATS = "JPEG PNG WEBP GIF AVIF HEIF TIFF BMP JPEG2000 PPM TGA".split()
# The start of a HEIC file: a 4-byte length, then its type (ISO 23008-12, annex B).
HEIC_START = re.compile(rb".{4}ftyp(hei[cxms]|hev[cx]|mif1)", re.DOTALL)
# InceptionV3's input: 299 x 299 pixels (Szegedy et al., arXiv 1512.00567, table 1).
IMAGE_SIZE = 299
ORIENTATION = 0x0112  # EXIF 2.32, table 6; the transpositions by Pillow's names
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

# Limits checked before decoding. Pillow's own is 179 million pixels.
MAX_FILE_BYTES = 1 << 30
MAX_SIDE = 65_535  # as in JPEG; rows of millions of pixels are very slow to resize
# Pixels above which images are decoded one at a time, and slow decoders are refused.
LARGE_IMAGE = 1 << 25
# A progressive JPEG has about ten scans. Each costs a pass over all pixels, but only 10 bytes.
MAX_SCANS = 100
# Marker, length and number of components of a scan (ITU-T T.81, B.2.3).
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]")
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF 6.0, section 15

_large_image_lock = threading.Lock()


class StoredImage(Protocol):
    """An image without a file of its own, such as a member of a tar shard."""

    def read(self) -> bytes:
        """Return the encoded bytes; raises ImageError or OSError."""


ImageRefT = TypeVar("ImageRefT", bound="ImageRef")
ImageRef: TypeAlias = str | os.PathLike[str] | StoredImage
ImageLike: TypeAlias = "ImageRef | Image.Image | numpy.ndarray"


def load_image(path: ImageLike, size: int | None = None) -> Image.Image:
    """Decode one image (the first frame of an animation) to upright 8-bit RGB.

    Images above ``LARGE_IMAGE`` pixels are decoded one at a time, whatever the number of
    threads: each needs up to 3.5 GB.

    Args:
        path: the image: a file, an object that returns its bytes, a Pillow image, or uint8
            (H, W, 3), RGB.
        size: the side to which it will be resized. A JPEG more than twice as large is decoded
            at the smallest of its own scales (1/2, 1/4, 1/8) that stays above twice
            ``size``: many times faster for photographs. Other images above
            ``LARGE_IMAGE`` pixels are reduced to no less than twice ``size``.

    Raises:
        ImageError: the image cannot be read; the message says why.
    """
    from PIL import Image

    with opened(path) as image:
        pixels = image.width * image.height
        if size is not None and image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))
        # A progressive JPEG keeps all its coefficients in memory, whatever the scale.
        if not image.info.get("progressive"):
            pixels = image.width * image.height
        with _large_image_lock if pixels > LARGE_IMAGE else nullcontext():
            image.load()
            transposition = TRANSPOSITIONS.get(image.getexif().get(ORIENTATION, 1))
            photo = to_rgb(image)
            if size is not None and photo.width * photo.height > LARGE_IMAGE:
                across, down = (max(1, side // (2 * size)) for side in photo.size)
                photo = photo.reduce((across, down))
    if transposition is None:
        return photo
    return photo.transpose(Image.Transpose[transposition])


@contextmanager
def opened(path: ImageLike) -> Iterator[Image.Image]:
    """Open an image with Pillow, undecoded; every failure in the block becomes an ImageError.

    A Pillow image or an array is copied.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    formats = [name for name in FORMATS if name != "HEIF" or _register_heif()]
    content = b""
    try:
        if isinstance(path, numpy.ndarray):
            if path.dtype != numpy.uint8 or path.ndim != 3 or path.shape[2] != 3 or not path.size:
                raise ImageError(f"not uint8 (height, width, 3) but {path.dtype} {path.shape}")
            path = Image.fromarray(path)
        if isinstance(path, Image.Image):
            yield path.copy()
            return
        content = _checked_content(path)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _check_header(image)
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(_why_unidentified(content)) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels (decompression bomb?)") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error) or type(error).__name__) from error
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        # Pillow's plugins raise ValueError, SyntaxError, struct.error, IndexError and others on
        # damaged files; whatever the error, the run continues.
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _checked_content(path: ImageRef) -> bytes:
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        status = path.stat()
        # A pipe or a device may never end. Reading a folder raises its own error.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ImageError("not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        content = path.read_bytes()
    else:
        content = path.read()
    scans = SCAN.finditer(content) if content.startswith(b"\xff\xd8") else ()
    if any(itertools.islice(scans, MAX_SCANS, None)):
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
    return content


def _check_header(image: Image.Image) -> None:
    """Raise ImageError for an image whose format makes it far slower or larger than it looks."""
    from PIL import Image

    if max(image.size) > MAX_SIDE:
        raise ImageError(f"a side of {max(image.size):,} pixels; at most {MAX_SIDE:,} are read")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    # libtiff decodes whole tiles, however little of them is in the image.
    if tile > LARGE_IMAGE:
        raise ImageError(f"tiles of {tile:,} pixels; at most {LARGE_IMAGE:,} are read")
    # Decoders written in Python take half a microsecond per pixel.
    decoders = {tile.codec_name for tile in getattr(image, "tile", ())}
    if image.width * image.height > LARGE_IMAGE and decoders & Image.DECODERS.keys():
        raise ImageError(f"more than {LARGE_IMAGE:,} pixels in a form that is very slow to decode")


def _why_unidentified(content: bytes) -> str:
    if not content:
        return "empty file"
    if HEIC_START.match(content) and not _register_heif():
        return "a HEIC image, which needs a plugin: pip install pillow-heif"
    return "not a supported image"


@functools.cache
def _register_heif() -> bool:
    """Register the HEIC plugin, which turns images upright itself; True if it is installed."""
    try:
        import pillow_heif
    except (ImportError, OSError):  # OSError: its library is incompatible with this system
        return False
    pillow_heif.register_heif_opener()
    return True


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB; transparency is composited over white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey values, integers in 0..65535 or floats in 0..1, to 8 bits.

    If values exceed that range, the image's own range is used. Infinities become black or white,
    NaN black.
    """
    import numpy
    from PIL import Image

    values = numpy.asarray(image)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    finite = values[numpy.isfinite(values)]
    if finite.size and (finite.min() < low or finite.max() > high):
        low, high = float(finite.min()), float(finite.max())
    result = numpy.empty(values.shape, numpy.uint8)
    for row, line in enumerate(values):  # row by row, as float64 takes eight bytes per pixel
        line = numpy.nan_to_num(line.astype(numpy.float64).clip(low, high), nan=low)
        result[row] = numpy.round((line - low) * (255.0 / max(high - low, 1e-12)))
    return Image.fromarray(result)


def to_square(image: Image.Image, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Resize the whole image to a square with antialiasing: RGB, uint8 (size, size, 3).

    Nothing is cropped: captions mention what is at the edges too.
    """
    import numpy
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return numpy.asarray(image)


def read_square(path: ImageLike, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Decode ``path`` and resize it to a square, uint8 (size, size, 3); raises ImageError."""
    return to_square(load_image(path, size), size)


def augmented_square(
    image: Image.Image, random: Random, flip: bool, min_crop: float, size: int = IMAGE_SIZE
) -> numpy.ndarray:
    """Crop an RGB image at random and resize it to a square, uint8 (size, size, 3).

    A crop keeps at least the fraction ``min_crop`` of each side. With ``flip`` it is flipped left
    to right with probability 0.5.
    """
    import numpy
    from PIL import Image

    width, height = (side * random.uniform(min_crop, 1.0) for side in image.size)
    left = random.uniform(0.0, image.width - width)
    top = random.uniform(0.0, image.height - height)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return numpy.asarray(image)


def unreadable_images(paths: Sequence[ImageRefT], workers: int) -> dict[ImageRefT, str]:
    """Decode every image once; return the reason for each that cannot be decoded."""

    def reason(path: ImageRefT) -> str | None:
        try:
            load_image(path, IMAGE_SIZE)
        except ImageError as error:
            return str(error)
        return None

    reasons = prefetch(reason, paths, workers, ahead=4 * workers)
    return {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}
