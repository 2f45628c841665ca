"""What datasets a feature cache has, and the checksums over all of its bytes.

A byte that a disk or a copy spoiled is in one of three places, each with a CRC-32 of its own: in a
row's features (``crc``), in what else a row has (``row_crc``), or in the structure of the file
around the values (``layout_crc``). Damage to a row costs that row; to the structure, the file.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy

from pipeline.features.hdf5_layout import Dataset, Layout, read_layout, structure_crc
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError

FEATURE_TYPE = numpy.dtype("<f2")
# The datasets beside the features, with their types; S: bytes of a fixed number.
COLUMNS = {"names": "S", "status": "u1", "reason": "S", "crc": "u4", "complete": "u1"}
# What caches have all of, but for old ones, which have none.
LATER_COLUMNS = {"stamps": "i8", "row_crc": "u4", "layout_crc": "u4"}

MapMode: TypeAlias = Literal["r", "r+"]


def check_places(places: Mapping[str, Dataset]) -> None:
    """Make sure that datasets are there, of the types and shapes that a cache has, and apart.

    Raises:
        ValueError: one is not.
    """
    # One alone tells that the others are gone by damage.
    columns = COLUMNS | (LATER_COLUMNS if LATER_COLUMNS.keys() & places.keys() else {})
    missing = sorted({"features", *columns} - places.keys())
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    rows = places["names"].shape
    expected = {name: (kind, rows) for name, kind in columns.items()}
    expected |= {"features": ("f2", (*rows, FEATURE_SIZE)), "complete": ("u1", (1,))}
    if "stamps" in expected:
        expected |= {"stamps": ("i8", (*rows, 2)), "layout_crc": ("u4", (1,))}
    spans = []
    for name, (kind, shape) in expected.items():
        place = places[name]
        fits = place.dtype.kind == "S" if kind == "S" else place.dtype == numpy.dtype(f"<{kind}")
        if len(rows) != 1 or place.shape != shape or not fits:
            raise ValueError(f"{name} is of another type or shape")
        if place.offset is not None:
            spans.append((place.offset, place.offset + place.size))
        elif name != "features":
            raise ValueError(f"{name} is not in the file")
    spans.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError("its datasets overlap")


def map_dataset(path: Path, dataset: Dataset, mode: MapMode) -> numpy.memmap:
    """Map a contiguous dataset's bytes as an array."""
    assert dataset.offset is not None
    return numpy.memmap(path, dataset.dtype, mode, dataset.offset, dataset.shape)


def map_again(path: Path, dataset: Dataset, mode: MapMode) -> numpy.memmap:
    """Do the same in a file that could be mapped before.

    Raises:
        UserError: it is gone, or shorter now.
    """
    try:
        return map_dataset(path, dataset, mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can no longer be opened ({reason})") from error


def row_crcs(columns: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Give the CRC-32 of each row of some columns, (R,) or (R, n) each: uint32 (R,)."""
    rows = len(columns[0])
    parts = [
        numpy.frombuffer(values.tobytes(), "u1").reshape(rows, values.nbytes // max(rows, 1))
        for values in columns
    ]
    joined = numpy.concatenate(parts, axis=1)
    return numpy.array([zlib.crc32(row) for row in joined], dtype="<u4")


def seal_structure(path: Path) -> None:
    """Write down the checksum of the structure of a new cache."""
    layout = read_layout(path)
    map_dataset(path, layout.datasets["layout_crc"], "r+")[0] = structure_crc(path, layout)


def check_structure(path: Path, layout: Layout) -> None:
    """Compare the structure of a file with its checksum, if it has one.

    Raises:
        ValueError: it differs.
    """
    place = layout.datasets.get("layout_crc")
    if place is not None:
        check_places(layout.datasets)
        if map_dataset(path, place, "r")[0] != structure_crc(path, layout):
            raise ValueError(f"{path.name}: bytes outside of its rows are damaged")


def all_finite(features: numpy.ndarray) -> numpy.ndarray:
    """Tell which rows of float16 (R, 2048) have neither infinity nor NaN: bool (R,)."""
    exponent = numpy.uint16(0x7C00)  # all of its bits are set in these alone
    return numpy.asarray(((features.view("<u2") & exponent) != exponent).all(axis=1))
