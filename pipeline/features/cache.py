"""The feature cache: one HDF5 file that keeps what the encoder says of every image.

Layout (N images, in the order of their names' bytes):

    features  (N, 2048) float16   one row an image
    names     (N,) UTF-8          paths relative to the data folder
    status    (N,) uint8          0 pending, 1 done, 2 failed
    reason    (N,) UTF-8          why an image failed
    crc       (N,) uint32         CRC-32 of the row of features, which is 0 where an image failed
    stamps    (N, 2) int64        the image's size in bytes and time in ns; 0, 0: not known
    row_crc   (N,) uint32         CRC-32 of the row's name, status, reason, crc and stamp
    layout_crc (1,) uint32        CRC-32 of all bytes of the file but the datasets' values
    complete  (1,) uint8          1 when no row is pending

    attributes: schema_version, data (the folder), encoder, weights_sha256, transform, precision,
                weights_source, torchvision, engine, images_sha256

Every dataset is contiguous and allocated when the file is made. Afterwards nothing but
raw values changes, at offsets that are known, so rows are written and read past the HDF5
library: a process killed at any moment cannot break the file's structure, and reading a
row costs one page of memory, however many rows there are. The file carries the suffix
``.partial`` until it is complete.

Where several processes extracted (``feature_shards``), ``features`` is a virtual dataset: its
rows lie in the shards beside the file, each of them such a cache itself. ``feature_writer``
writes caches; this module reads them. Old caches have no stamps and no last two checksums.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy

from pipeline.datasets.tar_shards import is_tar_shards, shards_folder
from pipeline.features.cache_columns import (
    MapMode,
    all_finite,
    check_places,
    check_structure,
    map_again,
    map_dataset,
    row_crcs,
)
from pipeline.features.hdf5_layout import read_layout
from pipeline.features.sharded_features import ShardedFeatures, find_shards
from pipeline.models.encoder_identity import FEATURE_SIZE as FEATURE_SIZE
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.utils.errors import UserError

SCHEMA_VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2
REASON_BYTES = 160
# Rows touched at a time where a whole cache is walked through: 32 MB of features.
CHUNK = 8192


def partial_path(path: Path) -> Path:
    """Give the name that a cache has while it is being made."""
    return path.with_name(path.name + ".partial")


class FeatureCache:
    """A cache opened for reading. Arrays are mapped, not loaded, so any size opens at once.

    Attributes:
        identity: what made the features.
        data: the folder of the images when it was made.
        shards: the files of its rows' features, where they are not in the file itself.
        status: uint8 (N,), mapped.
        stamps: int64 (N, 2), mapped; 0 in old caches.

    Raises:
        UserError: the file is missing, no feature cache, or of another schema version.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path = path
        if not path.is_file():
            unfinished = partial_path(path).is_file()
            raise UserError(
                f"{path}: the feature cache is not finished; run extract_features.py again"
                if unfinished
                else f"{path}: no such feature cache; make it with extract_features.py"
            )
        try:
            layout = read_layout(path)
            if layout.attributes.get("schema_version") != SCHEMA_VERSION:
                raise UserError(
                    f"{path}: not a feature cache of schema version {SCHEMA_VERSION}; "
                    "make it anew: extract_features.py --force"
                )
            places = layout.datasets
            check_places(places)
            texts = {name: str(value) for name, value in layout.attributes.items()}
            fields = EncoderIdentity.__dataclass_fields__.keys() & texts.keys()
            self.identity = EncoderIdentity(**{field: texts[field] for field in fields})
            self.images_sha256, self.data = texts["images_sha256"], texts["data"]
            mode: MapMode = "r+" if writable else "r"
            self.shards: list[Path] = []
            self._open_features: Callable[[], numpy.memmap | ShardedFeatures]
            if places["features"].offset is None:
                self.shards, self._open_features = find_shards(path, places["features"])
            else:
                self._open_features = functools.partial(map_again, path, places["features"], mode)
            self._open_features()
            self._names = map_dataset(path, places["names"], mode)
            self.status = map_dataset(path, places["status"], mode)
            self._open_reason = functools.partial(map_again, path, places["reason"], mode)
            self._crc = map_dataset(path, places["crc"], mode)
            self._complete = map_dataset(path, places["complete"], mode)
            self._row_crc: numpy.memmap | None = None
            self.stamps: numpy.ndarray = numpy.broadcast_to(numpy.int64(0), (len(self), 2))
            if "row_crc" in places:
                self.stamps = map_dataset(path, places["stamps"], mode)
                self._row_crc = map_dataset(path, places["row_crc"], mode)
            check_structure(path, layout)
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: not a readable feature cache ({error}); "
                "extract_features.py --force makes it anew"
            ) from error

    def __len__(self) -> int:
        return len(self._names)

    def flush(self) -> None:
        """Force what was written through the maps to disk."""
        if not self.shards:
            self.own_features.flush()
        columns = (self._names, self._crc, self._reason, self.status, self._complete)
        for mapped in (*columns, self.stamps, self._row_crc):
            if isinstance(mapped, numpy.memmap):
                mapped.flush()

    def seal(self, rows: numpy.ndarray) -> None:
        """Write down the checksums of rows that are no longer to change."""
        assert self._row_crc is not None
        self._row_crc[rows] = self._row_crcs(rows)

    def _row_crcs(self, rows: numpy.ndarray) -> numpy.ndarray:
        columns = (self._names, self.status, self._reason, self._crc, self.stamps)
        return row_crcs([column[rows] for column in columns])

    @property
    def features(self) -> numpy.memmap | ShardedFeatures:
        """The features, float16 (N, 2048), mapped anew.

        The pages that are read or written through a map count as this process's memory for
        as long as the map lives; so none is kept.
        """
        return self._open_features()

    @property
    def _reason(self) -> numpy.memmap:
        """The reasons, mapped anew: the checksums pass over all of them, which are many bytes."""
        return self._open_reason()

    @property
    def own_features(self) -> numpy.memmap:
        """The same as an array of the file itself, to be written to; not for shards."""
        features = self.features
        assert isinstance(features, numpy.memmap)
        return features

    @property
    def complete(self) -> bool:
        """Whether the file says that no row is pending."""
        return bool(self._complete[0] == 1)

    def name(self, row: int | numpy.integer) -> str:
        """Give the image's path, relative to the data folder, of one row.

        Raises:
            UserError: it would lead out of that folder.
        """
        name = os.fsdecode(bytes(self._names[row]))
        if not _is_below(name):
            raise UserError(
                f"{self.path}: names an image outside of its folder ({name}); "
                "extract_features.py --force makes it anew"
            )
        return name

    def names(self, status: int | None = None) -> list[str]:
        """List all names, or those of rows with one status, in row order.

        Raises:
            UserError: a row's name or status is damaged.
        """
        for known in self._parts(None):
            self.refuse_damage(known[~self._fit(known)])
        rows = range(len(self)) if status is None else numpy.flatnonzero(self.status == status)
        return [self.name(row) for row in rows]

    def failures(self) -> dict[str, str]:
        """Give name and reason of every image that could not be read."""
        reasons = self._reason
        return {
            self.name(row): bytes(reasons[row]).decode("utf-8", "ignore")
            for row in numpy.flatnonzero(self.status == FAILED)
        }

    def rows(self, names: Sequence[str]) -> numpy.ndarray:
        """Find the rows of ``names``: int64 (len(names),), -1 where there is no such name."""
        wanted = numpy.array([os.fsencode(name) for name in names], dtype="S")
        if not len(self) or not len(wanted):
            return numpy.full(len(wanted), -1, dtype=numpy.int64)
        # In the names' own type: for a longer one numpy would copy all names to widen them.
        found = numpy.searchsorted(self._names, wanted.astype(self._names.dtype))
        found = numpy.minimum(found, len(self) - 1)
        return numpy.where(self._names[found] == wanted, found, -1)

    def changed(self, rows: numpy.ndarray, stamps: numpy.ndarray) -> numpy.ndarray:
        """Tell which rows' images are others now: those whose known stamps differ.

        Args:
            rows: int64 (R,).
            stamps: int64 (R, 2), as the images are now.

        Returns:
            bool (R,).
        """
        before = self.stamps[rows]
        return (before != stamps).any(1) & before.any(1) & stamps.any(1)

    def damaged_rows(self, rows: numpy.ndarray | None = None) -> numpy.ndarray:
        """List those rows, of all that are done or failed or of ``rows``, whose checksums do not
        fit, or whose features are no numbers. In a complete cache a pending row is damaged, too.
        """
        damaged: list[int] = []
        for part in self._parts(rows):
            features = self.features[part]
            fit = self._fit(part) & all_finite(features)
            # Old caches have no checksum of what is not there.
            sealed = (self.status[part] == DONE) | (self._row_crc is not None)
            damaged += (
                row
                for row, fits, has_crc, values in zip(part, fit, sealed, features, strict=True)
                if not fits or (has_crc and zlib.crc32(values) != self._crc[row])
            )
        return numpy.array(damaged, dtype=numpy.int64)

    def refuse_damage(self, rows: numpy.ndarray) -> None:
        """Raise a UserError if there are any among ``rows``, which are damaged."""
        if len(rows):
            raise UserError(
                f"{self.path}: {len(rows)} rows are damaged (row {rows[0]}, for one); "
                "extract_features.py makes them again"
            )

    def _parts(self, rows: numpy.ndarray | None) -> Iterator[numpy.ndarray]:
        """Give rows, or all those that should have checksums, some at a time."""
        for start in range(0, len(self) if rows is None else len(rows), CHUNK):
            if rows is not None:
                yield rows[start : start + CHUNK]
            elif self.complete:
                yield numpy.arange(start, min(start + CHUNK, len(self)))
            else:
                yield start + numpy.flatnonzero(self.status[start : start + CHUNK] != PENDING)

    def _fit(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Tell which rows are done or failed and, beside their features, undamaged: bool (R,)."""
        ended = numpy.isin(self.status[rows], (DONE, FAILED))
        return (
            ended
            if self._row_crc is None
            else ended & (self._row_crc[rows] == self._row_crcs(rows))
        )

    def read(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Copy rows out of the file: float32 (len(rows), 2048)."""
        return self.features[rows].astype(numpy.float32)


def default_cache_path(data: str | Path) -> Path:
    """Give the cache of a data folder, or of one with shards, where no other is named:
    data/features/FOLDER.h5.
    """
    if is_tar_shards(data):
        data = shards_folder(str(data))
    # Not resolve(), which would take the name of what a symbolic link points to.
    return Path("data/features") / f"{Path(os.path.abspath(data)).name}.h5"  # noqa: PTH100


def images_sha256(names: Sequence[str]) -> str:
    """Hash a list of names, which is in the order of its bytes."""
    return hashlib.sha256(b"\0".join(os.fsencode(name) for name in names)).hexdigest()


def _is_below(name: str) -> bool:
    """Tell whether a name is that of a file below a folder, and leads nowhere else."""
    if ".." not in name and ":" not in name and not name.startswith(("/", "\\")):
        return True  # as nearly all are, and there may be millions
    path = PurePath(name)
    return not (path.is_absolute() or path.drive or path.root or ".." in path.parts)
