"""The feature cache: one HDF5 file that keeps what the encoder says of every picture.

Layout (N pictures, in the order of their names' bytes):

    features  (N, 2048) float16   one row a picture
    names     (N,) UTF-8          paths relative to the data folder
    status    (N,) uint8          0 pending, 1 done, 2 failed
    reason    (N,) UTF-8          why a picture failed
    crc       (N,) uint32         CRC-32 of the row's bytes
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
writes caches; this module reads them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

import numpy

from pipeline.errors import UserError
from pipeline.hdf5_layout import Dataset, read_layout
from pipeline.tar_shards import is_tar_shards, shards_folder

SCHEMA_VERSION = 1
FEATURE_SIZE = 2048
PENDING, DONE, FAILED = 0, 1, 2
REASON_BYTES = 160
FEATURE_TYPE = numpy.dtype("<f2")
# The other datasets with their types; S: bytes of a fixed number.
COLUMNS = {"names": "S", "status": "u1", "reason": "S", "crc": "u4", "complete": "u1"}
# Rows touched at a time where a whole cache is walked through: 32 MB of features.
CHUNK = 8192

MapMode: TypeAlias = Literal["r", "r+"]


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder made features. Its fields are attributes of a cache, and in checkpoints.

    Attributes:
        encoder: the network's name.
        weights_sha256: hash of its weights, see ``encoder.weights_sha256``.
        transform: how a picture is brought to the network's input.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        weights_source: ``imagenet``, ``pretrained``, ``random`` or a file.
        torchvision: the version that built the network.
        engine: what ran it: ``torch`` or ``openvino``.
    """

    encoder: str
    weights_sha256: str
    transform: str
    precision: str
    weights_source: str
    torchvision: str
    engine: str = "torch"

    def mismatch(self, other: EncoderIdentity) -> str | None:
        """Say how two encoders differ in what decides features but for rounding, or None."""
        for field in ("encoder", "weights_sha256", "transform"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field.replace('_', ' ')} {mine[:20]} against {theirs[:20]}"
        return None


def partial_path(path: Path) -> Path:
    """Give the name that a cache has while it is being made."""
    return path.with_name(path.name + ".partial")


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


class FeatureCache:
    """A cache opened for reading. Arrays are mapped, not loaded, so any size opens at once.

    Attributes:
        identity: what made the features.
        data: the folder of the pictures when it was made.
        shards: the files of its rows' features, where they are not in the file itself.
        status: uint8 (N,), mapped.

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
            _check_places(places)
            texts = {name: str(value) for name, value in layout.attributes.items()}
            fields = EncoderIdentity.__dataclass_fields__.keys() & texts.keys()
            self.identity = EncoderIdentity(**{field: texts[field] for field in fields})
            self.images_sha256, self.data = texts["images_sha256"], texts["data"]
            mode: MapMode = "r+" if writable else "r"
            self.shards: list[Path] = []
            self._open_features: Callable[[], numpy.memmap | ShardedFeatures]
            if places["features"].offset is None:
                self._open_features = self._find_shards(places["features"])
            else:
                self._open_features = functools.partial(_map, path, places["features"], mode)
            self._open_features()
            self._names = _map(path, places["names"], mode)
            self.status = _map(path, places["status"], mode)
            self._reason = _map(path, places["reason"], mode)
            self._crc = _map(path, places["crc"], mode)
            self._complete = _map(path, places["complete"], mode)
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: not a readable feature cache ({error}); "
                "extract_features.py --force makes it anew"
            ) from error

    def _find_shards(self, features: Dataset) -> Callable[[], ShardedFeatures]:
        """Find the files behind a virtual dataset; only files beside the cache are opened.

        Raises:
            UserError: a shard is missing.
            ValueError: the dataset is not a row of shards.
        """
        starts, open_parts = [], []
        expected = 0
        for source in features.sources:
            shard = self.path.parent / source.file
            beside = shard.name == source.file != ".."
            if not beside or source.dataset != "features":
                raise ValueError(f"features in {source.file!r}")
            if not shard.is_file():
                raise UserError(
                    f"{shard}: missing, though {self.path.name} needs it; put it back, or make it "
                    "again with the command that made it"
                )
            part = read_layout(shard).datasets["features"]
            shape = (source.last + 1 - source.first, FEATURE_SIZE)
            if source.first != expected or part.offset is None or part.shape != shape:
                raise ValueError(f"{shard.name} has other rows")
            if part.dtype != FEATURE_TYPE:
                raise ValueError(f"{shard.name} has features of another type")
            expected = source.last + 1
            self.shards.append(shard)
            starts.append(source.first)
            open_parts.append(functools.partial(_map, shard, part, "r"))
        if features.shape != (expected, FEATURE_SIZE):
            raise ValueError("features of another shape")
        return functools.partial(ShardedFeatures, starts, open_parts)

    def __len__(self) -> int:
        return len(self._names)

    def flush(self) -> None:
        """Force what was written through the maps to disk."""
        if not self.shards:
            self.own_features.flush()
        for mapped in (self._names, self._crc, self._reason, self.status, self._complete):
            mapped.flush()

    @property
    def features(self) -> numpy.memmap | ShardedFeatures:
        """The features, float16 (N, 2048), mapped anew.

        The pages that are read or written through a map count as this process's memory for
        as long as the map lives; so none is kept.
        """
        return self._open_features()

    @property
    def own_features(self) -> numpy.memmap:
        """The same as an array of the file itself, to be written to; not for shards."""
        features = self.features
        assert isinstance(features, numpy.memmap)
        return features

    @property
    def complete(self) -> bool:
        """Whether the file says that no row is pending."""
        return bool(self._complete[0])

    def name(self, row: int | numpy.integer) -> str:
        """Give the picture's path, relative to the data folder, of one row.

        Raises:
            UserError: it would lead out of that folder.
        """
        name = os.fsdecode(bytes(self._names[row]))
        if not _is_below(name):
            raise UserError(
                f"{self.path}: names a picture outside of its folder ({name}); "
                "extract_features.py --force makes it anew"
            )
        return name

    def names(self, status: int | None = None) -> list[str]:
        """List all names, or those of rows with one status, in row order."""
        rows = range(len(self)) if status is None else numpy.flatnonzero(self.status == status)
        return [self.name(row) for row in rows]

    def failures(self) -> dict[str, str]:
        """Give name and reason of every picture that could not be read."""
        return {
            self.name(row): bytes(self._reason[row]).decode("utf-8", "ignore")
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

    def damaged_rows(self, rows: numpy.ndarray | None = None) -> numpy.ndarray:
        """List those rows, of all the done ones or of ``rows``, whose CRC does not fit."""
        if rows is None:
            rows = numpy.flatnonzero(self.status == DONE)
        damaged = [
            row
            for start in range(0, len(rows), CHUNK)
            for row, values in zip(
                rows[start : start + CHUNK], self.features[rows[start : start + CHUNK]], strict=True
            )
            if zlib.crc32(values.tobytes()) != self._crc[row]
        ]
        return numpy.array(damaged, dtype=numpy.int64)

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


def _check_places(places: Mapping[str, Dataset]) -> None:
    """Make sure that datasets are there, of the types and shapes that a cache has, and apart.

    Raises:
        ValueError: one is not.
    """
    missing = sorted({"features", *COLUMNS} - places.keys())
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    rows = places["names"].shape
    expected = {name: (kind, rows) for name, kind in COLUMNS.items()}
    expected |= {"features": ("f2", (*rows, FEATURE_SIZE)), "complete": ("u1", (1,))}
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


def _is_below(name: str) -> bool:
    """Tell whether a name is that of a file below a folder, and leads nowhere else."""
    if ".." not in name and ":" not in name and not name.startswith(("/", "\\")):
        return True  # as nearly all are, and there may be millions
    path = PurePath(name)
    return not (path.is_absolute() or path.drive or path.root or ".." in path.parts)


def _map(path: Path, dataset: Dataset, mode: MapMode) -> numpy.memmap:
    """Map a contiguous dataset's bytes as an array."""
    assert dataset.offset is not None
    return numpy.memmap(path, dataset.dtype, mode, dataset.offset, dataset.shape)
