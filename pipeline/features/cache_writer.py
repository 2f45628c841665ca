"""Write a feature cache that survives a kill at any time.

h5py first lays out the whole file: contiguous datasets, allocated at once. From then on, rows are
written at fixed offsets, without changing HDF5's own structures.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy

from pipeline.features.cache import (
    CHUNK,
    DATASETS,
    DONE,
    FAILED,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    FeatureCache,
    partial_path,
    row_crcs,
)
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.errors import UserError
from pipeline.utils.files import cannot_be_written, temporary_path
from pipeline.utils.terminal import echo

# Seconds between two commits; a kill loses at most the work of one interval.
COMMIT_INTERVAL = 1.0
NO_FEATURES = numpy.zeros(FEATURE_SIZE, numpy.float16)
# Upper limit of a file's bytes other than its rows.
STRUCTURE_BYTES = 1 << 14


class CacheWriter:
    """A partial cache being filled; rows are kept in memory until ``commit``, about once a second.

    ``cache`` is the same file, for reading.
    """

    def __init__(self, file: Path) -> None:
        self.cache = FeatureCache(file)
        self._handle = self.cache.path.open("r+b")
        self._uncommitted: dict[int, tuple[int, numpy.ndarray, bytes]] = {}
        self._last_commit = time.monotonic()

    def pending_batches(self, batch_size: int) -> Iterator[list[int]]:
        """Yield, whole, each batch of an uninterrupted run that has pending rows.

        The rounding of a row may depend on its batch, and a resumed cache must be byte-identical
        to an uninterrupted one.
        """
        for start in range(0, len(self.cache), batch_size):
            status = self.cache.status[start : start + batch_size]
            if (status == PENDING).any():
                yield list(range(start, start + len(status)))

    def write(
        self, rows: Sequence[int], features: numpy.ndarray, failures: Mapping[int, str]
    ) -> int:
        """Store features (len(rows), 2048) and the reasons of the rows that failed.

        Returns how many of these rows were pending.
        """
        pending = int((self.cache.status[[*rows, *failures]] == PENDING).sum())
        for row, value in zip(rows, features.astype(numpy.float16), strict=True):
            self._uncommitted[row] = (DONE, value, b"")
        for row, reason in failures.items():
            encoded = reason.encode("utf-8", "replace")[:REASON_BYTES]
            encoded = encoded.decode("utf-8", "ignore").encode()  # no partial character at the end
            self._uncommitted[row] = (FAILED, NO_FEATURES, encoded)
        if time.monotonic() - self._last_commit > COMMIT_INTERVAL:
            self.commit()
        return pending

    def commit(self) -> None:
        """Force the rows' values to disk, and only then mark the rows done or failed.

        Raises UserError if they cannot be written, or the file is gone.
        """
        if not self.cache.path.is_file():
            raise UserError(f"{self.cache.path}: is gone; the same command begins it anew")
        if self._uncommitted:
            rows = sorted(self._uncommitted)
            status, features, reasons = zip(*(self._uncommitted[row] for row in rows), strict=True)
            columns = {
                "status": numpy.array(status, "u1"),
                "features": numpy.stack(features),
                "reason": numpy.array(reasons, f"S{REASON_BYTES}"),
                "crc": numpy.array([zlib.crc32(values) for values in features], "<u4"),
            }
            try:
                self.put(numpy.array(rows), columns)
            except OSError as error:
                raise cannot_be_written(self.cache.path, error) from error
        self._uncommitted.clear()
        self._last_commit = time.monotonic()

    def put(self, rows: numpy.ndarray, columns: dict[str, numpy.ndarray]) -> None:
        """Write status, reason, crc and, if given, features of sorted rows, and a checksum per row.

        Raises OSError if they cannot be written.
        """
        present = {name: self.cache.column(name)[rows] for name in ("names", "stamps")}
        columns["row_crc"] = row_crcs({**present, **columns})
        self.put_values(rows, {name: v for name, v in columns.items() if name != "status"})
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.put_values(rows, {"status": columns["status"]})
        self._handle.flush()

    def put_values(self, rows: numpy.ndarray, columns: Mapping[str, numpy.ndarray]) -> None:
        """Write values at their offsets in the file; ``rows`` are sorted."""
        runs = numpy.split(numpy.arange(len(rows)), numpy.flatnonzero(numpy.diff(rows) != 1) + 1)
        for run in runs if len(rows) else []:
            for name, values in columns.items():
                dtype, shape, offset = self.cache.datasets[name]
                assert offset is not None
                row_bytes = dtype.itemsize * int(numpy.prod(shape[1:]))
                self._handle.seek(offset + int(rows[run[0]]) * row_bytes)
                self._handle.write(values[run[0] : run[-1] + 1].astype(dtype).tobytes())

    def finish(self) -> FeatureCache:
        """Commit, force everything to disk, and open the cache under its final name."""
        self.commit()
        path = self.cache.path.with_suffix("")  # without ".partial"
        try:
            with self._handle as handle:
                os.fsync(handle.fileno())
            self.cache.path.replace(path)
        except OSError as error:
            raise cannot_be_written(path, error) from error
        return FeatureCache(path)


def open_writer(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    data: str = "",
    stamps: numpy.ndarray | None = None,
    sources: Sequence[FeatureCache] = (),
    retry_failed: bool = False,
) -> CacheWriter:
    """Open the partial cache of ``path`` for the images ``names``, keeping all work already done.

    ``names`` are in byte order; ``stamps``, int64 (N, 2), are the images' sizes in bytes and
    times in ns. Rows of ``sources``, caches by the same encoder, are copied unless they are
    damaged, their image has changed, or, with ``retry_failed``, they failed.

    Raises:
        UserError: the file cannot be written.
    """
    partial = partial_path(path)
    stamps = numpy.zeros((len(names), 2), dtype=numpy.int64) if stamps is None else stamps
    own = next((source for source in sources if source.path == partial), None)
    in_place = own is not None and all(place.offset is not None for place in own.datasets.values())
    if own is None or not in_place or not is_current(own, names, stamps, retry_failed):
        create_file(partial, names, identity, data, stamps, sources, retry_failed)
    return CacheWriter(partial)


def is_current(
    cache: FeatureCache,
    names: Sequence[str],
    stamps: numpy.ndarray,
    retry_failed: bool,
    first: int = 0,
    count: int | None = None,
) -> bool:
    """True if no image has to be added to the cache, removed from it or encoded again.

    ``names`` start at row ``first``, out of ``count`` rows in all.
    """
    rows = numpy.arange(first, first + len(names))
    if len(cache) != (count or len(names)) or not numpy.array_equal(cache.rows(names), rows):
        return False
    if cache.changed(rows, stamps).any():
        return False
    if not cache.complete:
        rows = rows[cache.status[rows] != PENDING]
    if retry_failed and (cache.status[rows] == FAILED).any():
        return False
    return not len(cache.damaged_rows(rows))


def create_file(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    data: str,
    stamps: numpy.ndarray,
    sources: Sequence[FeatureCache] = (),
    retry_failed: bool = False,
    shards: Sequence[FeatureCache] = (),
) -> None:
    """Lay out a whole cache at ``path`` and copy the good rows of ``sources``.

    With ``shards``, features stay there, and a virtual dataset refers to them.
    Raises UserError if the file cannot be written; ``path`` is then unchanged.
    """
    temporary = temporary_path(path)
    longest = max((len(os.fsencode(name)) for name in names), default=1)
    row_bytes = longest + REASON_BYTES + sum((1, 4, 16, 4)) + 2 * FEATURE_SIZE * (not shards)
    attributes = {**asdict(identity), "data": data}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before HDF5 begins: its disk-full errors are long and leave the file open.
        _reserve(temporary, "wb", STRUCTURE_BYTES + len(names) * row_bytes)
        _lay_out(temporary, len(names), longest, attributes, shards)
        _reserve(temporary, "r+b", temporary.stat().st_size)
        writer = CacheWriter(temporary)
        with writer._handle:
            for start in range(0, len(names), CHUNK):
                chunk = [os.fsencode(name) for name in names[start : start + CHUNK]]
                columns = {"names": numpy.array(chunk), "stamps": stamps[start : start + CHUNK]}
                writer.put_values(numpy.arange(start, start + len(chunk)), columns)
            writer._handle.flush()
            for source in sources:
                _take_over(writer, source, retry_failed, with_features=not shards)
        temporary.replace(path)
    except BaseException as error:
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_be_written(path, error) from error
        raise


def _lay_out(
    path: Path,
    count: int,
    longest: int,
    attributes: Mapping[str, str],
    shards: Sequence[FeatureCache],
) -> None:
    """Write the structure of a cache of ``count`` rows through h5py; all values are 0.

    Everything that determines the file's bytes is set here, independent of h5py's global settings
    and the clock. The format is that of HDF5 1.8, whose structures have checksums.
    """
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    creation.set_link_creation_order(0)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_LATEST)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    # Newly allocated parts of a file read as zeros without being written.
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    file_id = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)
    with h5py.File(file_id) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        for name, text in attributes.items():
            # Fixed-length: HDF5 has no checksums for variable-length strings.
            encoded = text.encode("utf-8", "replace")
            kind = h5py.string_dtype("utf-8", max(1, len(encoded)))
            file.attrs.create(name, encoded, dtype=kind)
        for name, (row_shape, kind) in DATASETS.items():
            length = {"names": longest, "reason": REASON_BYTES}.get(name)
            dtype = h5py.string_dtype("utf-8", length) if length else numpy.dtype(kind)
            space = h5py.h5s.create_simple((count, *row_shape))
            in_shards = shards and name == "features"
            h5py.h5d.create(
                file.id,
                name.encode(),
                h5py.h5t.py_create(dtype, logical=True),
                space,
                _virtual(space, shards) if in_shards else properties,
            )


def _virtual(space: h5py.h5s.SpaceID, shards: Sequence[FeatureCache]) -> h5py.h5p.PropDCID:
    """Return the properties of a virtual dataset over the features of ``shards``."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    first = 0
    for shard in shards:
        shape = (len(shard), FEATURE_SIZE)
        space.select_hyperslab((first, 0), shape)
        # By its bare name: HDF5 looks beside the file that contains the virtual dataset.
        name, source = os.fsencode(shard.path.name), h5py.h5s.create_simple(shape)
        properties.set_virtual(space, name, b"features", source)
        first += len(shard)
    space.select_all()
    return properties


def _take_over(
    writer: CacheWriter, source: FeatureCache, retry_failed: bool, with_features: bool
) -> None:
    """Copy the good rows of ``source`` to the pending rows with the same names."""
    cache, damaged_rows = writer.cache, 0
    for old in source.chunks():
        damaged = source.damaged_rows(old)
        damaged_rows += len(damaged)
        old = numpy.setdiff1d(old, damaged)
        if retry_failed:
            old = old[source.status[old] == DONE]
        new = cache.find(source.column("names")[old])
        wanted = (new >= 0) & (cache.status[new] == PENDING)
        wanted &= ~source.changed(old, cache.column("stamps")[new])
        old, new = old[wanted], new[wanted]
        columns = {name: source.column(name)[old] for name in ("status", "reason", "crc")}
        if with_features:
            columns["features"] = source.read(old, numpy.float16)
        writer.put(new, columns)
    if damaged_rows:
        echo(f"{source.path}: damaged rows, to be made again: {damaged_rows:,}", err=True)


def _reserve(path: Path, mode: str, size: int) -> None:
    """Allocate a file's disk space up front, so that a full disk shows before the work begins."""
    with path.open(mode) as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, max(size, 1))
        except AttributeError:
            return  # macOS and Windows have no such call
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
