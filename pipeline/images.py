"""Find pictures, decode them, and bring them to the square that InceptionV3 reads.

Every stage reads pictures through this module, so a picture looks the same to
extraction, fine-tuning and captioning. Pillow's decoder and its resampling release
Python's lock, so plain threads decode beside the network (``prefetch``).
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy
    from PIL import Image

# What Pillow reads, for HEIC with the plugin pillow-heif, and people keep photographs in.
IMAGE_EXTENSIONS = frozenset(
    f".{extension}"
    for extension in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k", "jpx", "png", "apng", "webp"),
        *("heic", "heif", "hif", "avif", "gif", "tif", "tiff", "bmp", "tga"),
        *("ppm", "pgm", "pbm", "pnm"),
    )
)
# How HEIC files begin, after the four bytes of a length (ISO 23008-12, annex B).
HEIC_BEGINNINGS = tuple(
    b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")
)
# InceptionV3's input: 299 x 299 pixels (Szegedy et al., arXiv 1512.00567, table 1).
IMAGE_SIZE = 299

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoredPicture(Protocol):
    """A picture that is not a file of its own, as in a tar shard."""

    def read(self) -> bytes:
        """Give the picture's bytes; an ImageError or OSError where it cannot."""


PictureFile = TypeVar("PictureFile", bound="Picture")
Picture: TypeAlias = str | os.PathLike[str] | StoredPicture


class ImageError(Exception):
    """A picture that cannot be read; the text is the reason, without the file's name."""


def find_images(folder: Path) -> list[str]:
    """List the pictures below ``folder`` by their paths relative to it.

    Sub-folders are searched, symbolic links to folders followed (each folder once, so a
    loop ends). Hidden files and folders and macOS archive leftovers are passed over.

    Returns:
        Paths with ``/`` between their parts, in the order of their UTF-8 bytes.

    Raises:
        UserError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        information = Path(parent).stat()
        if (information.st_dev, information.st_ino) in seen:
            folders.clear()
            continue
        seen.add((information.st_dev, information.st_ino))
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        relative = Path(parent).relative_to(folder)
        names += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_EXTENSIONS
        ]
    return sorted(names, key=os.fsencode)


def load_image(path: Picture, size: int | None = None) -> Image.Image:
    """Decode one picture to 8-bit RGB, upright, as a person would see it.

    EXIF orientation is applied, transparency is laid over white, 16-bit and float
    pictures are scaled to 8 bits, CMYK and palettes converted; of an animation the first
    frame is taken.

    Args:
        path: the picture: its file, or what gives its bytes.
        size: the side it will be resized to. A JPEG more than twice as large is decoded
            at the smallest of its own scales (1/2, 1/4, 1/8) that stays above twice
            ``size``, which is many times quicker for camera pictures.

    Raises:
        ImageError: the file is missing, empty, broken, truncated, far too large or no
            picture; the text says which.
    """
    from PIL import ImageOps

    with opened(path) as image:
        if size is not None and image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


@contextmanager
def opened(path: Picture) -> Iterator[Image.Image]:
    """Open a picture with Pillow, undecoded; whatever goes wrong in the block is an ImageError.

    Raises:
        ImageError: see ``load_image``.
    """
    from PIL import Image, UnidentifiedImageError

    _quieten_pillow()
    _register_heif()
    try:
        if isinstance(path, (str, os.PathLike)):
            file: Path | io.BytesIO = Path(path)
        else:
            file = io.BytesIO(path.read())
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(_why_unidentified(file)) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels (decompression bomb?)") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error) or type(error).__name__) from error
    except (MemoryError, KeyboardInterrupt, ImageError):
        raise
    except Exception as error:
        # Pillow's format plugins let ValueError, SyntaxError, struct.error, IndexError and
        # others through on damaged files; whatever it is, the run must go on.
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _why_unidentified(file: Path | io.BytesIO) -> str:
    if isinstance(file, Path):
        with file.open("rb") as opened_file:
            beginning = opened_file.read(12)
    else:
        beginning = file.getvalue()[:12]
    if not beginning:
        return "empty file"
    if beginning[4:].startswith(HEIC_BEGINNINGS) and not _register_heif():
        return "a HEIC picture, which needs a plugin: pip install pillow-heif"
    return "not a picture that Pillow reads"


@functools.cache
def _register_heif() -> bool:
    """Let Pillow read HEIC where the plugin is installed, and tell whether it is.

    The plugin turns a picture upright itself, and says in its EXIF that nothing is left to do.
    """
    try:
        import pillow_heif
    except (ImportError, OSError):  # OSError: its library does not fit the system
        return False
    pillow_heif.register_heif_opener()
    return True


@functools.cache
def _quieten_pillow() -> None:
    """Keep Pillow's warnings out of the progress bar.

    It warns above 89 megapixels, which panoramas reach, and refuses above twice that: the
    refusal is enough. It warns of odd metadata too, which says nothing about the pixels. The
    filters are set once for the process, as Python cannot set them for one thread.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without losing what is seen."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 16-bit, 32-bit and float grey values to 0..255.

    Integers keep their full scale (65535 is white); when a picture exceeds the scale, and
    for floats outside 0..1, its own range is used. Infinities become black and white, NaN
    black.
    """
    import numpy
    from PIL import Image

    values = numpy.asarray(image, dtype=numpy.float64)
    finite = values[numpy.isfinite(values)]
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if finite.size and (finite.min() < low or finite.max() > high):
        low, high = finite.min(), finite.max()
    values = numpy.nan_to_num(values.clip(low, high), nan=low)
    values = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(numpy.round(values).astype(numpy.uint8), mode="L")


def to_square(image: Image.Image, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Resize to ``size`` x ``size`` with antialiasing, the whole picture, sides squeezed.

    Nothing is cropped off: captions speak of what stands at the edges too.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    import numpy
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return numpy.asarray(image)


def read_square(path: Picture, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Decode ``path`` and bring it to a square: uint8 (size, size, 3).

    Raises:
        ImageError: see ``load_image``.
    """
    return to_square(load_image(path, size), size)


def unreadable_images(paths: Sequence[PictureFile], workers: int) -> dict[PictureFile, str]:
    """Decode every picture once, and give the reason for each that cannot be."""

    def reason(path: PictureFile) -> str | None:
        try:
            load_image(path, IMAGE_SIZE)
        except ImageError as error:
            return str(error)
        return None

    reasons = prefetch(reason, paths, workers, ahead=4 * workers)
    return {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}


def augmented_square(
    image: Image.Image, random: Random, flip: bool, smallest: float, size: int = IMAGE_SIZE
) -> numpy.ndarray:
    """Cut a random part out of a picture, flip it by chance, and bring it to a square.

    Args:
        image: an RGB picture.
        random: the source of chance.
        flip: whether left and right may be exchanged.
        smallest: the least share of each side that is kept.
        size: side of the result.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    import numpy
    from PIL import Image

    width, height = (side * random.uniform(smallest, 1.0) for side in image.size)
    left = random.uniform(0.0, image.width - width)
    top = random.uniform(0.0, image.height - height)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if flip and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return numpy.asarray(image)


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    start: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Map ``function`` over ``items`` in order, ``workers`` threads working in advance.

    At most ``ahead`` results wait to be taken, so memory does not grow with the number of
    items. An exception of ``function`` is raised where its result would have come. Every
    thread first calls ``start``.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=start) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
