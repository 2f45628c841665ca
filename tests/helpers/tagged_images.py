"""Images with all the metadata that a camera and photo programs leave, made by hand."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path

import numpy
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from pipeline.datasets import images

TIFF_ASCII, TIFF_SHORT, TIFF_LONG, TIFF_RATIONAL, TIFF_UNDEFINED = 2, 3, 4, 5, 7
Entry = tuple[int, int, int, bytes]

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#"
 xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/" xmlns:own="http://example.org/own/1.0/"
 xmp:Rating="4" own:Note="không đổi">
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Tựa đề</rdf:li></rdf:Alt></dc:title>
<dc:description><rdf:Alt><rdf:li xml:lang="de">Ein Hund</rdf:li></rdf:Alt></dc:description>
<dc:subject><rdf:Bag><rdf:li>dog</rdf:li><rdf:li>sân vườn</rdf:li></rdf:Bag></dc:subject>
<xmpMM:History><rdf:Seq><rdf:li rdf:parseType="Resource"><stEvt:action>saved</stEvt:action>
<stEvt:softwareAgent>Somebody's program</stEvt:softwareAgent></rdf:li></rdf:Seq></xmpMM:History>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()


def directory(entries: list[Entry], at: int, following: int = 0) -> bytes:
    """Lay out one directory of TIFF (II), its longer values behind it, for position ``at``."""
    table, values = struct.pack("<H", len(entries)), b""
    values_at = at + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        if len(value) > 4:
            field = struct.pack("<I", values_at + len(values))
            values += value + b"\0" * (len(value) % 2)
        else:
            field = value.ljust(4, b"\0")
        table += struct.pack("<HHI", tag, kind, count) + field
    return table + struct.pack("<I", following) + values


def text(tag: int, content: bytes) -> Entry:
    return tag, TIFF_ASCII, len(content) + 1, content + b"\0"


def long(tag: int, number: int) -> Entry:
    return tag, TIFF_LONG, 1, struct.pack("<I", number)


def degrees(tag: int, *parts: int) -> Entry:
    return tag, TIFF_RATIONAL, 3, b"".join(struct.pack("<II", part, 1) for part in parts)


def thumbnail() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "green").save(buffer, "JPEG")
    return buffer.getvalue()


def exif(orientation: int = 6, description: bytes | None = None) -> bytes:
    """Make EXIF with GPS, a thumbnail, and Canon's maker note, whose offsets are absolute."""
    small = thumbnail()
    places = [8] * 5
    parts: list[bytes] = []
    for _ in range(2):  # the second time the places are known
        photo, maker_note, gps, second, small_at = places
        first = [
            *([text(0x010E, description)] if description is not None else []),
            *(text(0x010F, b"Canon"), text(0x0110, b"Canon PowerShot S40")),
            (0x0112, TIFF_SHORT, 1, struct.pack("<H", orientation)),
            *(text(0x013B, b"J\xf6rg"), long(0x8769, photo), long(0x8825, gps)),
        ]
        note = directory(
            [text(0x0006, b"IMG:PowerShot S40 JPEG"), text(0x0009, b"The owner's name")],
            maker_note,
        )
        parts = [
            directory(first, 8, second),
            directory(
                [
                    text(0x9003, b"2004:02:29 12:34:56"),
                    (0x927C, TIFF_UNDEFINED, len(note), struct.pack("<I", maker_note)),
                    (0xA001, TIFF_SHORT, 1, struct.pack("<H", 1)),
                ],
                photo,
            ),
            note,
            directory(
                [text(1, b"N"), degrees(2, 10, 46, 37), text(3, b"E"), degrees(4, 106, 41, 43)],
                gps,
            ),
            directory(
                [
                    (0x0103, TIFF_SHORT, 1, struct.pack("<H", 6)),
                    *(long(0x0201, small_at), long(0x0202, len(small))),
                ],
                second,
            ),
        ]
        ends = [8 + sum(map(len, parts[: number + 1])) for number in range(5)]
        places = ends
    return b"Exif\0\0II*\0\x08\0\0\0" + b"".join(parts) + small


def iptc_segment(datasets: list[tuple[int, int, bytes]]) -> bytes:
    """Make the APP13 segment in which JPEGs carry IPTC."""
    content = b"".join(
        struct.pack(">BBBH", 0x1C, record, number, len(value)) + value
        for record, number, value in datasets
    )
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(content)) + content
    resource += b"\0" * (len(content) % 2)
    body = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


@functools.cache
def profile() -> bytes:
    """Make a colour profile, once: it holds the time of its making."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photograph(width: int = 96, height: int = 64) -> Image.Image:
    y, x = numpy.mgrid[0:height, 0:width]
    colours = numpy.stack([x * 2, y * 3, (x + y) % 256], axis=-1)
    return Image.fromarray(colours.astype(numpy.uint8))


def make_tagged(path: Path, exif_block: bytes | None = None) -> Path:
    """Draw an image and give it what its format takes: EXIF, XMP, colour profile, comment."""
    block = exif() if exif_block is None else exif_block
    image = photograph()
    extension = path.suffix[1:].lower()
    if extension == "jpg":
        image.save(
            *(path, "JPEG"), exif=block, xmp=XMP, icc_profile=profile(), comment=b"A comment"
        )
    elif extension == "png":
        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", XMP.decode())
        chunks.add_text("Author", "Somebody")
        image.putalpha(200)
        image.save(path, exif=block, icc_profile=profile(), pnginfo=chunks, dpi=(72, 72))
    elif extension == "tif":
        tags = {0x010F: "Canon", 0x0112: 6, 700: XMP}
        image.save(path, compression="tiff_lzw", icc_profile=profile(), tiffinfo=tags)
    elif extension == "gif":
        image.convert("P").save(path, comment=b"A comment", transparency=3)
    elif extension == "jp2":
        image.save(path)
    else:  # WebP, AVIF, HEIC
        images._register_heif()
        image.save(path, exif=block, xmp=XMP, icc_profile=profile(), quality=80)
    return path
