"""Where the datasets of a feature cache lie in its file, read without the HDF5 library.

A cache may come from a stranger, or from a disk that errs, and the library is not made for that: of
1,480 caches with a few spoiled bytes (HDF5 2.0.0) one ended the process and three kept it busy for
ever, which no ``except`` can help. It also follows links, and opens what virtual datasets and
external storage name. So what a cache holds is read here, in the one form that ``feature_writer``
makes (HDF5 File Format Specification 3.0: superblock version 0, old-style groups and headers):
every place is checked to be inside the file, nothing is opened beside it, and all else is refused.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1  # an address where there is nothing
DATASPACE, DATATYPE, EXTERNAL, LAYOUT, FILTERS = 0x01, 0x03, 0x07, 0x08, 0x0B
ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = 0x0C, 0x10, 0x11
CONTIGUOUS, VIRTUAL = 1, 3
# Far above what a cache has, values apart; the list of a virtual dataset's shards is the longest.
MOST_BYTES = 1 << 24
MOST_ITEMS = 10_000
# The properties of IEEE's numbers, little-endian, by their size: bits, exponent, mantissa, bias.
FLOATS = {
    2: struct.pack("<HHBBBBI", 0, 16, 10, 5, 0, 10, 15),
    4: struct.pack("<HHBBBBI", 0, 32, 23, 8, 0, 23, 127),
    8: struct.pack("<HHBBBBI", 0, 64, 52, 11, 0, 52, 1023),
}


class LayoutError(ValueError):
    """The file is not laid out as a feature cache is; the text says where."""


@dataclass(frozen=True)
class Source:
    """Rows of a virtual dataset, ``first`` to ``last``, that lie in ``dataset`` of another file."""

    file: str
    dataset: str
    first: int
    last: int


@dataclass(frozen=True)
class Dataset:
    """One dataset: contiguous at ``offset``, or where that is None, virtual over ``sources``."""

    dtype: numpy.dtype
    shape: tuple[int, ...]
    offset: int | None
    sources: tuple[Source, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a file holds: its datasets and attributes by name."""

    datasets: dict[str, Dataset]
    attributes: dict[str, int | str]


def read_layout(path: Path) -> Layout:
    """Read where everything is; no value of a dataset is.

    Raises:
        LayoutError: it is not an HDF5 file as ``feature_writer`` makes them, or is damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        file = _File(handle)
        try:
            return _read(file)
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise LayoutError("it is damaged") from error


def structure_crc(path: Path, layout: Layout) -> int:
    """Give the CRC-32 of all that is in a file beside the values of its datasets.

    Raises:
        LayoutError: that is more than a feature cache has.
        OSError: it cannot be read.
    """
    spans = [
        (d.offset, d.offset + d.size) for d in layout.datasets.values() if d.offset is not None
    ]
    with path.open("rb") as handle:
        file = _File(handle)
        crc, place = 0, 0
        for start, end in [*sorted(spans), (file.size, file.size)]:
            crc = zlib.crc32(file.piece(place, max(0, start - place)), crc)
            place = max(place, end)
    return crc


class _File:
    """Pieces of a file, each checked to be inside it, and not too many."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._left = MOST_BYTES
        self.size = os.fstat(handle.fileno()).st_size

    def piece(self, offset: int, size: int) -> bytes:
        self._left -= size
        if self._left < 0 or offset + size > self.size:
            raise LayoutError("it is cut off or damaged")
        self._handle.seek(offset)
        return self._handle.read(size)

    def unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.piece(offset, struct.calcsize("<" + form)))


def _read(file: _File) -> Layout:
    # Signature, versions, sizes of offsets and lengths, then the base address, that of the free
    # space, the end and the driver, and the root group's entry: its name and its header.
    begin = file.piece(0, min(file.size, 80))
    if not begin.startswith(SIGNATURE):
        raise LayoutError("it is no HDF5 file")
    versions, base, _, end, driver, _, root = struct.unpack_from("<8s8xQQQQQQ", begin, 8)
    if versions != bytes([0, 0, 0, 0, 0, 8, 8, 0]) or base or driver != UNDEFINED:
        raise LayoutError("its form is not that of a feature cache")
    if end > file.size:
        raise LayoutError("it is cut off")
    attributes: dict[str, int | str] = {}
    tables = []
    for kind, body in _messages(file, root):
        if kind == ATTRIBUTE:
            name, value = _attribute(file, body)
            if value is not None:
                attributes[name] = value
        elif kind == SYMBOL_TABLE:
            tables.append(struct.unpack_from("<QQ", body))
    if len(tables) != 1:
        raise LayoutError("its form is not that of a feature cache")
    datasets = {}
    for name, header in _members(file, *tables[0]):
        dataset = _dataset(file, header)
        if name in datasets:
            raise LayoutError("its table of contents is damaged")
        if dataset is not None:
            datasets[name] = dataset
    return Layout(datasets, attributes)


def _messages(file: _File, address: int) -> Iterator[tuple[int, bytes]]:
    """Give the messages of an object's header (version 1): their kinds and bodies."""
    version, count, _, size = file.unpack("BxHII", address)
    if version != 1 or count > MOST_ITEMS:
        raise LayoutError("a header is damaged")
    blocks = [file.piece(address + 16, size)]
    left = count
    while blocks and left:
        block, place = blocks.pop(0), 0
        while place + 8 <= len(block) and left:
            kind, length, flags = struct.unpack_from("<HHB", block, place)
            body = block[place + 8 : place + 8 + length]
            if len(body) != length or flags & 2:  # 2: it stands elsewhere and is shared
                raise LayoutError("a header is damaged")
            place, left = place + 8 + length, left - 1
            if kind == CONTINUATION:
                blocks.append(file.piece(*struct.unpack_from("<QQ", body)))
            else:
                yield kind, body


def _members(file: _File, tree: int, heap: int) -> Iterator[tuple[str, int]]:
    """Give the members of a group, by name, and the places of their headers."""
    signature, kind, level, used = file.unpack("4sBBH", tree)
    if signature != b"TREE" or kind or level or used > 32:
        raise LayoutError("its table of contents is damaged")
    signature, names_size, names_at = file.unpack("4s4xQ8xQ", heap)
    if signature != b"HEAP":
        raise LayoutError("its table of contents is damaged")
    names = file.piece(names_at, names_size)
    for number in range(used):  # keys and children take turns, a key first
        (node,) = file.unpack("Q", tree + 24 + 16 * number + 8)
        signature, count = file.unpack("4s2xH", node)
        if signature != b"SNOD" or count > 32:
            raise LayoutError("its table of contents is damaged")
        for place in range(node + 8, node + 8 + 40 * count, 40):
            name_at, header = file.unpack("QQ", place)
            end = names.find(b"\0", name_at)
            if end <= name_at or header == UNDEFINED:
                raise LayoutError("it holds a link where a dataset should be")
            yield names[name_at:end].decode("utf-8"), header


def _dataset(file: _File, header: int) -> Dataset | None:
    """Describe a dataset; None for what a cache does not have."""
    found: dict[int, bytes] = {}
    for kind, body in _messages(file, header):
        if kind in found and kind in (DATASPACE, DATATYPE, LAYOUT):
            raise LayoutError("a header is damaged")
        found[kind] = body
    if EXTERNAL in found or FILTERS in found or not {DATASPACE, DATATYPE, LAYOUT} <= found.keys():
        return None
    dtype, shape = _dtype(found[DATATYPE]), _shape(found[DATASPACE])
    version, kind = found[LAYOUT][:2]
    if dtype is None:
        return None
    if (version, kind) == (3, CONTIGUOUS):
        offset, size = struct.unpack_from("<QQ", found[LAYOUT], 2)
        dataset = Dataset(dtype, shape, offset)
        if size != dataset.size or offset + size > file.size:
            raise LayoutError("a dataset is cut off or damaged")
        return dataset
    if (version, kind) == (4, VIRTUAL) and len(shape) == 2:
        mapped = _heap_object(file, *struct.unpack_from("<QI", found[LAYOUT], 2))
        return Dataset(dtype, shape, None, tuple(_sources(mapped, shape[1])))
    return None


def _dtype(body: bytes) -> numpy.dtype | None:
    """Give the type of a dataset or attribute in numpy's terms; None for others."""
    kind, bits, size = body[0] & 15, body[1], struct.unpack_from("<I", body, 4)[0]
    properties = body[8:]
    if kind == 0 and size in (1, 2, 4, 8) and bits & ~8 == 0:
        if struct.unpack_from("<HH", properties) != (0, 8 * size):
            return None
        return numpy.dtype(f"<{'i' if bits & 8 else 'u'}{size}")
    if kind == 1 and size in FLOATS and properties.startswith(FLOATS[size]):
        return numpy.dtype(f"<f{size}") if body[1:3] == bytes([0x20, 8 * size - 1]) else None
    if kind == 3 and 0 < size <= MOST_BYTES:
        return numpy.dtype(f"S{size}")
    return None


def _shape(body: bytes) -> tuple[int, ...]:
    version, rank = body[:2]
    if version not in (1, 2) or rank > 8:
        raise LayoutError("a shape is damaged")
    return struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def _attribute(file: _File, body: bytes) -> tuple[str, int | str | None]:
    """Give the name and value of an attribute; None for what is neither whole number nor text."""
    version, *sizes = struct.unpack_from("<BxHHH", body)
    parts, place = [], 8
    for size in sizes:
        parts.append(body[place : place + size])
        place += -(-size // 8) * 8
    name, datatype, dataspace = parts
    text = name.rstrip(b"\0").decode("utf-8")
    if version != 1 or len(datatype) < 8:
        return text, None
    shape, value = _shape(dataspace), body[place:]
    if shape:
        return text, None
    if datatype[0] & 15 == 9 and datatype[1] & 15 == 1:  # a text of any length
        length, heap, index = struct.unpack_from("<IQI", value)
        found = _heap_object(file, heap, index) if length else b""
        return text, found[:length].decode("utf-8")
    dtype = _dtype(datatype)
    if dtype is None or dtype.kind not in "iu":
        return text, None
    return text, int(numpy.frombuffer(value[: dtype.itemsize], dtype)[0])


def _heap_object(file: _File, heap: int, index: int) -> bytes:
    """Give an object of the heap in which texts and lists of sources lie."""
    signature, version, size = file.unpack("4sB3xQ", heap)
    if signature != b"GCOL" or version != 1:
        raise LayoutError("its heap is damaged")
    content = file.piece(heap, size)
    place = 16
    for _ in range(MOST_ITEMS):
        number, length = struct.unpack_from("<H6xQ", content, place)
        place += 16
        if number == 0 or place + length > size:  # 0: the free rest
            break
        if number == index:
            return content[place : place + length]
        place += -(-length // 8) * 8
    raise LayoutError("its heap is damaged")


def _sources(block: bytes, width: int) -> Iterator[Source]:
    """Take the list of a virtual dataset apart, whose rows have ``width`` numbers."""
    version, count = struct.unpack_from("<BQ", block)
    if version or count > MOST_ITEMS:
        raise LayoutError("a virtual dataset is damaged")
    place = 9
    for _ in range(count):
        end = block.index(b"\0", place)
        file, place = os.fsdecode(block[place:end]), end + 1
        end = block.index(b"\0", place)
        dataset, place = os.fsdecode(block[place:end]), end + 1
        there, place = _rows(block, place, width)
        here, place = _rows(block, place, width)
        if here is None or (there is not None and there != (0, here[1] - here[0])):
            raise LayoutError("a virtual dataset is not one of whole files")
        yield Source(file, dataset, *here)


def _rows(block: bytes, place: int, width: int) -> tuple[tuple[int, int] | None, int]:
    """Give the first and last row of a selection, None for all, and where the next begins."""
    kind, version = struct.unpack_from("<II", block, place)
    if kind == 3 and version == 1:
        return None, place + 16
    rank, blocks, *corners = struct.unpack_from("<6I", block, place + 16)
    if (kind, version, rank, blocks, corners[1::2]) != (2, 1, 2, 1, [0, width - 1]):
        raise LayoutError("a virtual dataset is not one of whole rows")
    return (corners[0], corners[2]), place + 40
