"""The feature cache: one HDF5 file with one feature vector per image.

data/README.md describes its datasets; the file has the suffix ``.partial`` until every row is done
or failed. This module reads caches, including copies made by HDF5 tools. If several processes
extracted the features (``sharded_cache``), ``features`` is a virtual dataset over shards beside
the file, each itself a cache.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import h5py
import numpy

from pipeline.datasets.tar_shards import is_tar_shards, shards_folder
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.errors import UserError

SCHEMA_VERSION = 2
PENDING, DONE, FAILED = 0, 1, 2
REASON_BYTES = 160
# Row shape and type of each dataset; S: fixed-length bytes.
DATASETS: dict[str, tuple[tuple[int, ...], str]] = {
    "features": ((FEATURE_SIZE,), "<f2"),
    "names": ((), "S"),
    "status": ((), "|u1"),
    "reason": ((), "S"),
    "crc": ((), "<u4"),
    "stamps": ((2,), "<i8"),
    "row_crc": ((), "<u4"),
}
CHECKED_COLUMNS = ("names", "status", "reason", "crc", "stamps")
# Rows processed at a time when traversing a whole cache: 32 MB of features.
CHUNK = 8192


class StoredDataset(NamedTuple):
    """Type, shape and offset of a dataset; the offset is None unless its bytes are contiguous."""

    dtype: numpy.dtype
    shape: tuple[int, ...]
    offset: int | None


def partial_path(path: Path) -> Path:
    """Return the name that a cache has until it is complete."""
    return path.with_name(path.name + ".partial")


def is_foreign(path: Path) -> bool:
    """True if a file is another program's HDF5: readable, but without a schema version."""
    try:
        with h5py.File(path, "r") as file:
            return "schema_version" not in file.attrs
    except OSError:
        return False


class FeatureCache:
    """A cache opened for reading. Nothing is loaded, so a cache of any size opens at once.

    Attributes:
        identity: the encoder that made the features.
        data: the folder of the images when it was made.
        shards: the files that hold the features, if they are not in the file itself.
        datasets: type, shape and offset of each dataset.

    Raises:
        UserError: the file is missing, not a feature cache, or of another schema version.
    """

    def __init__(self, path: Path, may_have_shards: bool = True) -> None:
        self.path = path
        self.shards: list[Path] = []
        self._loaded: dict[str, numpy.ndarray] = {}
        if not path.is_file():
            unfinished = partial_path(path).is_file()
            raise UserError(
                f"{path}: the feature cache is not finished; run extract_features.py again"
                if unfinished
                else f"{path}: no such feature cache; make it with extract_features.py"
            )
        try:
            with h5py.File(path, "r") as file:
                self._open(file, may_have_shards)
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{path}: not a readable feature cache ({reason}); "
                "extract_features.py --force makes it anew"
            ) from error

    def _open(self, file: h5py.File, may_have_shards: bool) -> None:
        version = file.attrs.get("schema_version")
        if not isinstance(version, numpy.integer) or version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path}: not a feature cache of schema version {SCHEMA_VERSION}; "
                "make it anew: extract_features.py --force"
            )
        texts = {}
        for name in ("data", *EncoderIdentity.__dataclass_fields__):
            text = file.attrs[name]
            texts[name] = text.decode() if isinstance(text, bytes) else text
            if not isinstance(texts[name], str):
                raise ValueError(f"the attribute {name} is no text")
        self.data = texts.pop("data")
        self.identity = EncoderIdentity(**texts)
        self.datasets: dict[str, StoredDataset] = {}
        for name, (row_shape, kind) in DATASETS.items():
            dataset = _own_dataset(file, name)
            shape = (*file["names"].shape[:1], *row_shape)
            fits = dataset.dtype.kind == "S" if kind == "S" else dataset.dtype.str == kind
            if dataset.shape != shape or not fits:
                raise ValueError(f"{name} has another type or shape")
            dtype = numpy.dtype(dataset.dtype.str)
            self.datasets[name] = StoredDataset(dtype, shape, dataset.id.get_offset())
            if dataset.is_virtual:
                if name != "features" or not may_have_shards:
                    raise ValueError(f"{name} is a virtual dataset")
                self.shards = _shards_of(self.path, dataset)

    def __len__(self) -> int:
        return self.datasets["names"].shape[0]

    @property
    def complete(self) -> bool:
        """True if the file has its final name; none of its rows should be pending."""
        return self.path.suffix != ".partial"

    @property
    def status(self) -> numpy.ndarray:
        """PENDING, DONE or FAILED for each row: uint8 (N,)."""
        return self.column("status")

    def column(self, name: str) -> numpy.ndarray:
        """Return all rows of a dataset, memory-mapped; a compressed or chunked copy is loaded.

        Raises UserError if the file is gone or has become shorter.
        """
        dtype, shape, offset = self.datasets[name]
        if offset is None:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]
        try:
            # Mapped anew each time: pages read through a map count as this process's memory.
            return numpy.memmap(self.path, dtype, "r", offset, shape)
        except (OSError, ValueError) as error:
            raise self._lost(error) from error

    def read(self, rows: numpy.ndarray, dtype: type = numpy.float32) -> numpy.ndarray:
        """Return the features of ``rows``, int64 (R,), in any order: (R, 2048)."""
        if self.datasets["features"].offset is not None:
            return self.column("features")[rows].astype(dtype)
        if not len(rows):
            return numpy.empty((0, FEATURE_SIZE), dtype)
        wanted, places = numpy.unique(rows, return_inverse=True)
        # A slice is much faster than a list of rows, and traversals of a cache ask for slices.
        first, last = int(wanted[0]), int(wanted[-1])
        whole = last - first + 1 == len(wanted)
        values = self._load("features", slice(first, last + 1) if whole else wanted)
        return values[places].astype(dtype)

    def _load(self, name: str, rows: slice | numpy.ndarray = slice(None)) -> numpy.ndarray:
        try:
            with h5py.File(self.path, "r") as file:
                return file[name][rows]
        except (OSError, KeyError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        return UserError(f"{self.path}: can no longer be opened ({reason})")

    def name(self, row: int | numpy.integer) -> str:
        """Return the path of a row's image, relative to the data folder, which it never leaves."""
        return self._path_of(self.column("names")[row])

    def _path_of(self, encoded: numpy.bytes_) -> str:
        name = os.fsdecode(bytes(encoded))
        # Path objects are slow to make, there may be millions of names, and few look suspicious.
        if name.startswith(("/", "\\")) or ":" in name or ".." in name:
            path = PurePath(name)
            if path.anchor or ".." in path.parts:
                raise UserError(
                    f"{self.path}: names an image outside of its folder ({name}); "
                    "extract_features.py --force makes it anew"
                )
        return name

    def names(self, status: int | None = None) -> list[str]:
        """Return all names, or those of rows with one status, in row order.

        Raises UserError if a row's name or status is damaged.
        """
        for known in self.chunks():
            self.refuse_damage(known[~self._fit(known)])
        encoded = self.column("names")
        if status is not None:
            encoded = encoded[self.status == status]
        return [self._path_of(name) for name in encoded]

    def failures(self) -> dict[str, str]:
        """Return the name of every image that could not be read, and why."""
        failed = numpy.flatnonzero(self.status == FAILED)
        reasons = self.column("reason")[failed]
        texts = [bytes(reason).decode("utf-8", "ignore") for reason in reasons]
        return dict(zip(map(self.name, failed), texts, strict=True))

    def rows(self, names: Sequence[str]) -> numpy.ndarray:
        """Return the rows of ``names``: int64 (len(names),), -1 where there is no such name."""
        return self.find(numpy.array([os.fsencode(name) for name in names], dtype="S"))

    def find(self, names: numpy.ndarray) -> numpy.ndarray:
        """Return the rows of ``names``, given as bytes, (R,); see ``rows``."""
        known = self.column("names")
        if not len(known) or not len(names):
            return numpy.full(len(names), -1, dtype=numpy.int64)
        # Cast to the known names' type: numpy would otherwise copy and widen all names.
        found = numpy.searchsorted(known, names.astype(known.dtype))
        found = numpy.minimum(found, len(known) - 1)
        return numpy.where(known[found] == names, found, -1)

    def changed(self, rows: numpy.ndarray, stamps: numpy.ndarray) -> numpy.ndarray:
        """Return which rows' images have changed, bool (R,): both stamps known, and different.

        ``rows`` is int64 (R,); ``stamps``, int64 (R, 2), are the images' current stamps.
        """
        before = self.column("stamps")[rows]
        return (before != stamps).any(1) & before.any(1) & stamps.any(1)

    def chunks(self) -> Iterator[numpy.ndarray]:
        """Yield all rows that should have checksums, in chunks."""
        for start in range(0, len(self), CHUNK):
            if self.complete:
                yield numpy.arange(start, min(start + CHUNK, len(self)))
            else:
                yield start + numpy.flatnonzero(self.status[start : start + CHUNK] != PENDING)

    def damaged_rows(self, rows: numpy.ndarray | None = None) -> numpy.ndarray:
        """Return the rows whose checksums do not match or whose features are not finite.

        By default checks all rows that are done or failed; in a complete cache, all rows.
        """
        parts = self.chunks() if rows is None else numpy.split(rows, range(CHUNK, len(rows), CHUNK))
        damaged = [numpy.empty(0, numpy.int64)]
        for part in parts:
            features = self.read(part, numpy.float16)
            crcs = numpy.array([zlib.crc32(row) for row in features], numpy.uint32)
            fit = self._fit(part) & (crcs == self.column("crc")[part])
            fit &= numpy.isfinite(features).all(axis=1)
            damaged.append(part[~fit])
        return numpy.concatenate(damaged)

    def refuse_damage(self, rows: numpy.ndarray) -> None:
        """Raise UserError if ``rows``, the damaged rows' numbers, is not empty."""
        if len(rows):
            raise UserError(
                f"{self.path}: {len(rows)} rows are damaged (row {rows[0]}, for one); "
                "extract_features.py makes them again"
            )

    def _fit(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Return which rows are done or failed and, features aside, undamaged: bool (R,)."""
        columns = {name: self.column(name)[rows] for name in CHECKED_COLUMNS}
        ended = numpy.isin(columns["status"], (DONE, FAILED))
        return ended & (self.column("row_crc")[rows] == row_crcs(columns))


def row_crcs(columns: Mapping[str, numpy.ndarray]) -> numpy.ndarray:
    """Return the CRC-32 of each row of ``CHECKED_COLUMNS``: uint32 (R,)."""
    rows = len(columns["names"])
    parts = [
        numpy.frombuffer(columns[name].tobytes(), "u1").reshape(rows, -1 if rows else 0)
        for name in CHECKED_COLUMNS
    ]
    return numpy.array([zlib.crc32(row) for row in numpy.hstack(parts)], "<u4")


def default_cache_path(data: str | Path) -> Path:
    """Return data/features/FOLDER.h5, the default cache of a folder of images or tar shards."""
    if is_tar_shards(data):
        data = shards_folder(str(data))
    # Not resolve(), which would take the name of what a symbolic link points to.
    return Path("data/features") / f"{Path(os.path.abspath(data)).name}.h5"  # noqa: PTH100


def _own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset; ValueError if it is missing or stored in other files."""
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise ValueError(f"{name} is missing")
    if file[name].external:
        raise ValueError(f"{name} is stored in other files")
    return file[name]


def _shards_of(path: Path, features: h5py.Dataset) -> list[Path]:
    """Return the files behind a virtual dataset, which must be caches beside ``path``."""
    shards = []
    for source in features.virtual_sources():
        shard = path.parent / source.file_name
        if shard.name != source.file_name or source.dset_name != "features":
            raise ValueError(f"features in {source.file_name!r}")
        if not shard.is_file():
            raise UserError(
                f"{shard}: missing, though {path.name} needs it; put it back, or make it "
                "again with the command that made it"
            )
        (first, _), (last, _) = source.vspace.get_select_bounds()
        if len(FeatureCache(shard, may_have_shards=False)) != last + 1 - first:
            raise ValueError(f"{shard.name} has other rows")
        shards.append(shard)
    return shards
