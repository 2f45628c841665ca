"""Find images, decode them, and bring them to the square that InceptionV3 reads.

Every stage reads images through this module, so an image looks the same to
extraction, fine-tuning and captioning. Pillow's decoder and its resampling release
Python's lock, so plain threads decode beside the network (``prefetch``).
"""

from __future__ import annotations

import functools
import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from pipeline.datasets.image_limits import (
    FORMATS,
    LARGE,
    check_header,
    checked_content,
    checked_file,
)
from pipeline.datasets.rgb_conversion import to_rgb
from pipeline.utils.errors import ImageError, UserError

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
# How EXIF's numbers say that an image is to be turned (EXIF 2.32, table 6), in Pillow's names.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
ORIENTATION = 0x0112
_large = threading.Lock()

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoredImage(Protocol):
    """An image that is not a file of its own, as in a tar shard."""

    def read(self) -> bytes:
        """Give the image's bytes; an ImageError or OSError where it cannot."""


ImageRefT = TypeVar("ImageRefT", bound="ImageRef")
ImageRef: TypeAlias = str | os.PathLike[str] | StoredImage


def find_images(folder: Path) -> list[str]:
    """List the images below ``folder`` by their paths relative to it.

    Sub-folders are searched, symbolic links to folders followed (each folder once, so a
    loop ends). Hidden files and folders and macOS archive leftovers are passed over.

    Returns:
        Paths with ``/`` between their parts, in the order of their UTF-8 bytes.

    Raises:
        UserError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
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


def load_image(path: ImageRef, size: int | None = None) -> Image.Image:
    """Decode one image to 8-bit RGB, upright, as a person would see it.

    EXIF orientation is applied, transparency is laid over white, 16-bit and float
    images are scaled to 8 bits, CMYK and palettes converted; of an animation the first
    frame is taken.

    Images of more than ``LARGE`` pixels are decoded one at a time, whatever the number of
    threads: one needs up to 3.2 GB.

    Args:
        path: the image: its file, or what gives its bytes.
        size: the side it will be resized to. A JPEG more than twice as large is decoded
            at the smallest of its own scales (1/2, 1/4, 1/8) that stays above twice
            ``size``, which is many times quicker for camera images. Of another image
            above ``LARGE`` pixels as many are averaged as leave twice ``size``.

    Raises:
        ImageError: the file is missing, empty, broken, truncated, far too large or no
            image; the text says which.
    """
    from PIL import Image

    with opened(path) as image:
        whole = image.width * image.height
        if size is not None and image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))
        # Of a progressive JPEG all coefficients are kept, whatever its scale.
        pixels = whole if image.info.get("progressive") else image.width * image.height
        with _large if pixels > LARGE else nullcontext():
            image.load()
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            photo = to_rgb(image, size)
    return photo if turn is None else photo.transpose(Image.Transpose[turn])


@contextmanager
def opened(path: ImageRef) -> Iterator[Image.Image]:
    """Open an image with Pillow, undecoded; whatever goes wrong in the block is an ImageError.

    Raises:
        ImageError: see ``load_image``.
    """
    from PIL import Image, UnidentifiedImageError

    _quieten_pillow()
    with_heif = _register_heif()
    try:
        if isinstance(path, (str, os.PathLike)):
            file = checked_file(Path(path))
        else:
            file = checked_content(path.read())
        formats = [name for name in FORMATS if name != "HEIF" or with_heif]
        with Image.open(file, formats=formats) as image:
            check_header(image)
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
        return "a HEIC image, which needs a plugin: pip install pillow-heif"
    return "not an image that Pillow reads"


@functools.cache
def _register_heif() -> bool:
    """Let Pillow read HEIC where the plugin is installed, and tell whether it is.

    The plugin turns an image upright itself, and says in its EXIF that nothing is left to do.
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


def to_square(image: Image.Image, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Resize to ``size`` x ``size`` with antialiasing, the whole image, sides squeezed.

    Nothing is cropped off: captions speak of what stands at the edges too.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    import numpy
    from PIL import Image

    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return numpy.asarray(image)


def read_square(path: ImageRef, size: int = IMAGE_SIZE) -> numpy.ndarray:
    """Decode ``path`` and bring it to a square: uint8 (size, size, 3).

    Raises:
        ImageError: see ``load_image``.
    """
    return to_square(load_image(path, size), size)


def unreadable_images(paths: Sequence[ImageRefT], workers: int) -> dict[ImageRefT, str]:
    """Decode every image once, and give the reason for each that cannot be."""

    def reason(path: ImageRefT) -> str | None:
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
    """Cut a random part out of an image, flip it by chance, and bring it to a square.

    Args:
        image: an RGB image.
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
