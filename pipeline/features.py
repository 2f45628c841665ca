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
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import h5py
import numpy

from pipeline.errors import UserError
from pipeline.files import temporary_path

SCHEMA_VERSION = 1
FEATURE_SIZE = 2048
PENDING, DONE, FAILED = 0, 1, 2
REASON_BYTES = 160
# Rows touched at a time where a whole cache is walked through: 32 MB of features.
CHUNK = 8192
# Seconds between two commits; a kill costs at most the work of one such span.
COMMIT_INTERVAL = 1.0


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder made features. Its fields are attributes of a cache, and in checkpoints.

    Attributes:
        encoder: the network's name.
        weights_sha256: hash of its weights, see ``encoder.weights_sha256``.
        transform: how a picture is brought to the network's input.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        weights_source: ``imagenet``, ``random`` or the path of a file; where to look again.
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


class FeatureCache:
    """A cache opened for reading. Arrays are mapped, not loaded, so any size opens at once.

    Attributes:
        identity: what made the features.
        data: the folder of the pictures when it was made.
        features: float16 (N, 2048), mapped from the file.
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
            with h5py.File(path, "r", locking=False) as file:
                if file.attrs.get("schema_version") != SCHEMA_VERSION:
                    raise UserError(
                        f"{path}: not a feature cache of schema version {SCHEMA_VERSION}; "
                        "make it anew: extract_features.py --force"
                    )
                fields = EncoderIdentity.__dataclass_fields__.keys() & file.attrs.keys()
                self.identity = EncoderIdentity(**{f: str(file.attrs[f]) for f in fields})
                self.images_sha256 = str(file.attrs["images_sha256"])
                self.data = str(file.attrs["data"])
                mode: Literal["r", "r+"] = "r+" if writable else "r"
                self._open_features = functools.partial(_map, path, *_place(file["features"]), mode)
                self._open_features()
                self._names = _map(path, *_place(file["names"]), mode)
                self.status = _map(path, *_place(file["status"]), mode)
                self._reason = _map(path, *_place(file["reason"]), mode)
                self._crc = _map(path, *_place(file["crc"]), mode)
                self._complete = _map(path, *_place(file["complete"]), mode)
        except PermissionError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path}: not a readable feature cache ({error}); "
                "extract_features.py --force makes it anew"
            ) from error

    def __len__(self) -> int:
        return len(self._names)

    def flush(self) -> None:
        """Force what was written through the maps to disk."""
        for mapped in (self._names, self.features, self._crc, self._reason, self.status):
            mapped.flush()

    @property
    def features(self) -> numpy.memmap:
        """The features, float16 (N, 2048), mapped anew.

        The pages that are read or written through a map count as this process's memory for
        as long as the map lives; so none is kept.
        """
        return self._open_features()

    @property
    def complete(self) -> bool:
        """Whether the file says that no row is pending."""
        return bool(self._complete[0])

    def name(self, row: int | numpy.integer) -> str:
        """Give the picture's path, relative to the data folder, of one row."""
        return os.fsdecode(bytes(self._names[row]))

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


class CacheWriter:
    """A partial cache being filled.

    Values are written at once; a row is marked done only after its values have been forced
    to disk, which ``commit`` does about once a second for all rows since the last.
    """

    def __init__(self, path: Path) -> None:
        self.final_path = path
        self.cache = FeatureCache(partial_path(path), writable=True)
        self._uncommitted: dict[int, int] = {}
        self._last_commit = time.monotonic()

    def pending_batches(self, batch_size: int) -> Iterator[list[int]]:
        """Give the rows still to be made, in the batches of an undisturbed run.

        A batch with one pending row is made again whole: the rounding of a row may depend
        on its batch, and a resumed cache must equal an undisturbed one byte for byte.
        """
        for start in range(0, len(self.cache), batch_size):
            status = self.cache.status[start : start + batch_size]
            if (status == PENDING).any():
                yield list(range(start, start + len(status)))

    def write(
        self, rows: Sequence[int], features: numpy.ndarray, failures: Mapping[int, str]
    ) -> int:
        """Store features (len(rows), 2048) and the reasons of the rows that failed.

        Returns:
            How many of these rows were pending.
        """
        touched = [*rows, *failures]
        news = int((self.cache.status[touched] == PENDING).sum())
        values, mapped = features.astype("<f2"), self.cache.features
        for row, value in zip(rows, values, strict=True):
            mapped[row] = value
            self.cache._crc[row] = zlib.crc32(value.tobytes())
            self.cache._reason[row] = b""
            self._uncommitted[row] = DONE
        for row, reason in failures.items():
            encoded = reason.encode("utf-8", "replace")[:REASON_BYTES]
            self.cache._reason[row] = encoded.decode("utf-8", "ignore").encode()
            self._uncommitted[row] = FAILED
        if time.monotonic() - self._last_commit > COMMIT_INTERVAL:
            self.commit()
        return news

    def commit(self) -> None:
        """Force what was written to disk, then mark it done."""
        self.cache.flush()
        for row, status in self._uncommitted.items():
            self.cache.status[row] = status
        self._uncommitted.clear()
        self._last_commit = time.monotonic()

    def finish(self) -> FeatureCache:
        """Mark the cache complete, move it to its final name, and open it there."""
        self.commit()
        self.cache.status.flush()
        self.cache._complete[0] = 1
        self.cache._complete.flush()
        partial = self.cache.path
        del self.cache  # Windows moves no file that is mapped
        partial.replace(self.final_path)
        return FeatureCache(self.final_path)


def default_cache_path(data: Path) -> Path:
    """Give the cache of a data folder where no other is named: data/features/FOLDER.h5."""
    # Not resolve(), which would take the name of what a symbolic link points to.
    return Path("data/features") / f"{Path(os.path.abspath(data)).name}.h5"  # noqa: PTH100


def begun_identity(path: Path) -> EncoderIdentity | None:
    """Tell by which encoder a partial or finished cache at ``path`` was begun, if there is one."""
    for candidate in (partial_path(path), path):
        if candidate.is_file():
            return FeatureCache(candidate).identity
    return None


def open_cache_writer(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    force: bool,
    retry_failed: bool,
    data: str = "",
) -> CacheWriter | None:
    """Open the cache at ``path`` for the pictures ``names``, keeping all work already done.

    A finished or partial cache by the same encoder gives the rows that it has; pictures
    added since are pending, pictures gone are left out, damaged rows are made again. ``data``
    is the folder of the pictures: one cache is for one folder, as names recur in others.

    Returns:
        A writer, or None when the cache is complete as it stands.

    Raises:
        UserError: the cache there was made by another encoder or of another folder, and
            ``force`` is not set.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output names the file to write")
    partial = partial_path(path)
    names = sorted(names, key=os.fsencode)
    if force:
        partial.unlink(missing_ok=True)
    previous = None
    for candidate in (partial, path):
        if candidate.is_file() and not force:
            previous = FeatureCache(candidate)
            break
    if previous is None:
        _create(partial, names, identity, data, None, retry_failed).replace(partial)
        return CacheWriter(path)
    mismatch = identity.mismatch(previous.identity)
    if mismatch is not None:
        raise UserError(
            f"{previous.path} was made by another encoder ({mismatch}); --force makes it anew, "
            "--output FILE keeps both"
        )
    if data != previous.data:
        raise UserError(
            f"{previous.path} is of the pictures in {previous.data}, not of those in {data}; "
            "--output FILE makes one for these, --force replaces it"
        )
    same_images = previous.images_sha256 == images_sha256(names)
    retry = retry_failed and bool((previous.status == FAILED).any())
    damaged = len(previous.damaged_rows())
    if previous.complete and previous.path == path and same_images and not (retry or damaged):
        return None
    _check_rounding(previous, identity)
    if previous.path == path or not same_images or retry or damaged:
        gone = len(previous) - int((previous.rows(names) >= 0).sum())
        if gone:
            click.echo(f"pictures that are gone, their features dropped: {gone:,}", err=True)
        temporary = _create(partial, names, identity, data, previous, retry_failed)
        del previous  # Windows replaces no file that is mapped
        temporary.replace(partial)
    return CacheWriter(path)


def _check_rounding(previous: FeatureCache, identity: EncoderIdentity) -> None:
    """Refuse to go on with a cache in another precision or by another engine than before."""
    for option in ("precision", "engine"):
        before, now = getattr(previous.identity, option), getattr(identity, option)
        if before != now:
            raise UserError(
                f"{previous.path} was begun with --{option} {before}, not {now}: give that to go "
                "on with it; --force makes it anew, --output FILE keeps both"
            )


def images_sha256(names: Sequence[str]) -> str:
    """Hash a list of names, which is in the order of its bytes."""
    return hashlib.sha256(b"\0".join(os.fsencode(name) for name in names)).hexdigest()


def _create(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    data: str,
    previous: FeatureCache | None,
    retry_failed: bool,
) -> Path:
    """Lay out a whole cache for ``path`` and take over what ``previous`` holds.

    Returns:
        The temporary file, to be moved to ``path``.
    """
    temporary = temporary_path(path)
    encoded = [os.fsencode(name) for name in names]
    count, longest = len(names), max(map(len, encoded), default=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            for field, value in {**asdict(identity), "data": data}.items():
                file.attrs[field] = value.encode("utf-8", "replace").decode()
            file.attrs["schema_version"] = SCHEMA_VERSION
            file.attrs["images_sha256"] = images_sha256(names)
            _allocate(file, "names", (count,), h5py.string_dtype("utf-8", longest))
            _allocate(file, "status", (count,), numpy.dtype("u1"))
            _allocate(file, "reason", (count,), h5py.string_dtype("utf-8", REASON_BYTES))
            _allocate(file, "crc", (count,), numpy.dtype("<u4"))
            _allocate(file, "complete", (1,), numpy.dtype("u1"))
            _allocate(file, "features", (count, FEATURE_SIZE), numpy.dtype("<f2"))
        _reserve(temporary)
        cache = FeatureCache(temporary, writable=True)
        cache._names[:] = encoded
        if previous is not None:
            _take_over(cache, previous, retry_failed)
        cache.flush()
        return temporary
    except OSError as error:
        with contextlib.suppress(OSError):  # a path that is no path at all cannot be unlinked
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _take_over(cache: FeatureCache, previous: FeatureCache, retry_failed: bool) -> None:
    """Copy the good rows of ``previous`` to the rows of the same names."""
    usable = previous.status == DONE
    usable[previous.damaged_rows()] = False
    if not retry_failed:
        usable |= previous.status == FAILED
    rows = numpy.flatnonzero(usable)
    for start in range(0, len(rows), CHUNK):
        old = rows[start : start + CHUNK]
        new = cache.rows([previous.name(row) for row in old])
        old, new = old[new >= 0], new[new >= 0]
        cache.features[new] = previous.features[old]
        cache._crc[new] = previous._crc[old]
        cache._reason[new] = previous._reason[old]
        cache.status[new] = previous.status[old]


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: numpy.dtype) -> None:
    """Create a contiguous dataset whose place in the file is fixed at once."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    # The new part of a file reads as zeros without writing them.
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    h5py.h5d.create(
        file.id,
        name.encode(),
        h5py.h5t.py_create(dtype, logical=True),
        h5py.h5s.create_simple(shape),
        properties,
    )


def _reserve(path: Path) -> None:
    """Take the file's disk space now, so that a full disk shows before the work, not amid it.

    Writing to a mapped page that has no block on a full disk would kill the process.
    """
    with path.open("r+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        try:
            os.posix_fallocate(handle.fileno(), 0, max(size, 1))
        except AttributeError:
            return  # macOS and Windows have no such call
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def _place(dataset: h5py.Dataset) -> tuple[numpy.dtype, int, tuple[int, ...]]:
    """Tell dtype, offset in the file and shape of a contiguous dataset."""
    dtype: numpy.dtype = dataset.dtype
    if h5py.check_string_dtype(dtype) is not None:
        dtype = numpy.dtype(f"S{dtype.itemsize}")
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"{dataset.name} is not contiguous")
    return dtype, offset, dataset.shape


def _map(
    path: Path,
    dtype: numpy.dtype,
    offset: int,
    shape: tuple[int, ...],
    mode: Literal["r", "r+"],
) -> numpy.memmap:
    """Map a dataset's bytes as an array."""
    return numpy.memmap(path, dtype, mode, offset, shape)
