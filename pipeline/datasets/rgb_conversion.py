"""Convert what Pillow decodes to 8-bit RGB, with little memory where an image is large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.datasets.image_limits import LARGE

if TYPE_CHECKING:
    from PIL import Image

# Pixels that are converted at once.
STRIP = 1 << 22


def to_rgb(image: Image.Image, size: int | None) -> Image.Image:
    """Convert any Pillow mode to RGB without losing what is seen.

    Args:
        image: a decoded image.
        size: the side it will be resized to. Of an image above ``LARGE`` pixels, which is
            converted strip by strip, pixels are averaged that leave at least twice ``size``.
    """
    from PIL import Image

    white = _range(image) if _is_deep(image) else (0.0, 255.0)
    if image.width * image.height <= LARGE:
        return _strip_to_rgb(image, *white)
    across, down = (1 if size is None else max(1, side // (2 * size)) for side in image.size)
    result = Image.new("RGB", (-(-image.width // across), -(-image.height // down)))
    for top, strip in _strips(image, down):
        result.paste(_strip_to_rgb(strip, *white).reduce((across, down)), (0, top // down))
    return result


def _strips(image: Image.Image, multiple: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Cut an image into strips of some rows, a multiple of ``multiple``; yields the first row."""
    rows = multiple * max(1, STRIP // (image.width * multiple))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(image: Image.Image, low: float, high: float) -> Image.Image:
    """Convert a part of an image; of deep ones ``low`` becomes black and ``high`` white."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if _is_deep(image):
        return _scale_to_8_bits(image, low, high).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _range(image: Image.Image) -> tuple[float, float]:
    """Find what of 16-bit, 32-bit and float grey values is black and what white.

    Integers keep their full scale (65535 is white); when an image exceeds the scale, and
    for floats outside 0..1, its own range is used, infinities and NaN left out.
    """
    import numpy

    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    lowest, highest = numpy.inf, -numpy.inf
    for _, strip in _strips(image):
        values = numpy.asarray(strip, dtype=numpy.float64)
        finite = values[numpy.isfinite(values)]
        lowest = finite.min(initial=lowest)
        highest = finite.max(initial=highest)
    return (lowest, highest) if lowest < low or high < highest else (low, high)


def _scale_to_8_bits(image: Image.Image, low: float, high: float) -> Image.Image:
    """Map ``low`` to 0 and ``high`` to 255. Infinities become black and white, NaN black."""
    import numpy
    from PIL import Image

    values = numpy.asarray(image, dtype=numpy.float64)
    values = numpy.nan_to_num(values.clip(low, high), nan=low)
    values = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(numpy.round(values).astype(numpy.uint8), mode="L")
