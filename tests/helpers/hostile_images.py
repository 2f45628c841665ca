"""Images that nobody takes: bombs of a few bytes, and small ones of every format to spoil."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy
from PIL import Image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(count: int) -> bytes:
    """Compress zeros without ever having them all."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count % (1 << 20))), packer.flush()])


def png(
    width: int, height: int, bits: int, colour: int, packed: bytes, extra: bytes = b""
) -> bytes:
    """Make a PNG of compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def black_png(
    width: int, height: int, bits: int = 8, colour: int = 0, extra: bytes = b"", samples: int = 1
) -> bytes:
    """Make a legal PNG; ``extra`` chunks come before the pixels."""
    row = 1 + (width * bits * samples + 7) // 8
    return png(width, height, bits, colour, zeros(height * row), extra)


def tiled_tiff(tile: int) -> bytes:
    """Make a TIFF of 100 x 100 pixels, in one tile of ``tile`` x ``tile``, deflated."""
    content = zeros(tile * tile)
    values = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    values |= {324: 8 + 2 + 12 * 10 + 4, 325: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + entries + bytes(4) + content


def overlapping_tags(size: int) -> bytes:
    """Make an EXIF directory of 65,535 tags that all have the same ``size`` bytes."""
    place = 8 + 2 + 12 * 65535 + 4
    entries = b"".join(struct.pack("<HHII", tag, 7, size, place) for tag in range(65535))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + entries + bytes(4 + size)


def jpeg_of_scans(count: int) -> bytes:
    """Make a progressive JPEG with ``count`` scans of no data at the end."""
    content = saved("JPEG", progressive=True, mode="L")
    scan = b"\xff\xda" + struct.pack(">HB2sBBB", 8, 1, b"\x01\x00", 1, 63, 0)
    return content[:-2] + scan * count + b"\xff\xd9"


def rle_bmp(width: int, height: int) -> bytes:
    """Make a run-length coded BMP whose rows have one pixel each; the decoder adds the rest."""
    rows = b"\x01\x01\0\0" * height + b"\0\x01"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return (
        b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes(1024) + rows
    )


def small_image(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    noise = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), numpy.uint8)
    noise[: size[1] // 2] = 90
    return Image.fromarray(noise).convert(mode)


def saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    small_image(mode).save(content, format, **options)
    return content.getvalue()


def _several(format: str) -> bytes:
    return saved(format, save_all=True, append_images=[small_image().rotate(180)])


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return saved("JPEG", exif=exif.tobytes(), icc_profile=bytes(200), comment=b"a comment")


def _heif() -> bytes:
    import pillow_heif

    content = io.BytesIO()
    pillow_heif.from_pillow(small_image(size=(64, 64))).save(content)
    return content.getvalue()


# Small images, by what is special about them.
SMALL: dict[str, Callable[[], bytes]] = {
    "jpeg": _turned,
    "progressive jpeg": functools.partial(saved, "JPEG", progressive=True),
    "cmyk jpeg": functools.partial(saved, "JPEG", "CMYK"),
    "mpo": functools.partial(_several, "MPO"),
    "png": functools.partial(saved, "PNG"),
    "palette png": functools.partial(saved, "PNG", "P", transparency=0),
    "16-bit png": functools.partial(saved, "PNG", "I;16"),
    "apng": functools.partial(_several, "PNG"),
    "gif": functools.partial(_several, "GIF"),
    "webp": functools.partial(saved, "WEBP"),
    "lossless webp": functools.partial(saved, "WEBP", "RGBA", lossless=True),
    "animated webp": functools.partial(_several, "WEBP"),
    "tiff": functools.partial(_several, "TIFF"),
    "float tiff": functools.partial(saved, "TIFF", "F"),
    "lzw tiff": functools.partial(saved, "TIFF", compression="tiff_lzw"),
    "deflated tiff": functools.partial(saved, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg tiff": functools.partial(saved, "TIFF", compression="jpeg"),
    "fax tiff": functools.partial(saved, "TIFF", "1", compression="group4"),
    "tiled tiff": functools.partial(tiled_tiff, 128),
    "bmp": functools.partial(saved, "BMP"),
    "rle bmp": functools.partial(rle_bmp, 24, 16),
    "tga": functools.partial(saved, "TGA", compression="tga_rle"),
    "ppm": functools.partial(saved, "PPM"),
    "plain ppm": lambda: b"P3 3 2 255\n" + b"1 22 255 " * 6,
    "deep ppm": lambda: b"P6 3 2 1023\n" + bytes(range(36)),
    "jpeg 2000": functools.partial(saved, "JPEG2000"),
    "avif": functools.partial(saved, "AVIF"),
    "heic": _heif,
}
