"""Features that lie in the shards of a cache (``feature_shards``), read as one array."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy

from pipeline.features.cache_columns import FEATURE_TYPE, check_structure, map_again
from pipeline.features.hdf5_layout import Dataset, read_layout
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.utils.errors import UserError


class ShardedFeatures:
    """Features (N, 2048) that lie in several files, one behind the other.

    Attributes:
        starts: int64 (S,): the first row of each file.
        open_parts: for each file what maps its features anew.
    """

    def __init__(
        self, starts: Sequence[int], open_parts: Sequence[Callable[[], numpy.memmap]]
    ) -> None:
        self.starts = numpy.array(starts, dtype=numpy.int64)
        self.open_parts = open_parts

    def __getitem__(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Copy rows, int (R,), out of the files: float16 (R, 2048)."""
        values = numpy.empty((len(rows), FEATURE_SIZE), dtype="<f2")
        part = numpy.searchsorted(self.starts, rows, side="right") - 1
        for number in numpy.unique(part):
            chosen = part == number
            values[chosen] = self.open_parts[number]()[rows[chosen] - self.starts[number]]
        return values


def find_shards(path: Path, features: Dataset) -> tuple[list[Path], Callable[[], ShardedFeatures]]:
    """Find the files behind a virtual dataset; only files beside the cache are opened.

    Returns:
        The files, and what maps their features.

    Raises:
        UserError: a shard is missing.
        ValueError: the dataset is not a row of shards.
    """
    shards: list[Path] = []
    starts, open_parts = [], []
    expected = 0
    for source in features.sources:
        shard = path.parent / source.file
        beside = shard.name == source.file != ".."
        if not beside or source.dataset != "features":
            raise ValueError(f"features in {source.file!r}")
        if not shard.is_file():
            raise UserError(
                f"{shard}: missing, though {path.name} needs it; put it back, or make it "
                "again with the command that made it"
            )
        layout = read_layout(shard)
        part = layout.datasets["features"]
        shape = (source.last + 1 - source.first, FEATURE_SIZE)
        if source.first != expected or part.offset is None or part.shape != shape:
            raise ValueError(f"{shard.name} has other rows")
        if part.dtype != FEATURE_TYPE:
            raise ValueError(f"{shard.name} has features of another type")
        check_structure(shard, layout)
        expected = source.last + 1
        shards.append(shard)
        starts.append(source.first)
        open_parts.append(functools.partial(map_again, shard, part, "r"))
    if features.shape != (expected, FEATURE_SIZE):
        raise ValueError("features of another shape")
    return shards, functools.partial(ShardedFeatures, starts, open_parts)
