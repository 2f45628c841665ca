"""Filling a feature cache: laid out whole at first, then written row by row, safe at any kill.

``features`` says what is in the file; ``open_cache_writer`` keeps whatever of it was done before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy

from pipeline.errors import UserError
from pipeline.features import (
    CHUNK,
    DONE,
    FAILED,
    FEATURE_SIZE,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    EncoderIdentity,
    FeatureCache,
    images_sha256,
    partial_path,
)
from pipeline.files import temporary_path
from pipeline.terminal import say

# Seconds between two commits; a kill costs at most the work of one such span.
COMMIT_INTERVAL = 1.0


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
        values, mapped = features.astype("<f2"), self.cache.own_features
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


def open_cache_writer(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    force: bool,
    retry_failed: bool,
    data: str = "",
    others: Sequence[Path] = (),
) -> CacheWriter | None:
    """Open the cache at ``path`` for the pictures ``names``, keeping all work already done.

    A finished or partial cache by the same encoder gives the rows that it has; pictures
    added since are pending, pictures gone are left out, damaged rows are made again. ``data``
    is the folder of the pictures: one cache is for one folder, as names recur in others.
    ``others`` are further caches, finished or partial, that may have rows of these pictures.

    Returns:
        A writer, or None when the cache is complete as it stands.

    Raises:
        UserError: a cache there was made by another encoder or of another folder, and
            ``force`` is not set.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output names the file to write")
    partial = partial_path(path)
    names = sorted(names, key=os.fsencode)
    if force:
        partial.unlink(missing_ok=True)
        _create(partial, names, identity, data, [], retry_failed).replace(partial)
        return CacheWriter(path)
    own = existing_cache(path)
    sources = [own] if own is not None else []
    sources += [FeatureCache(file) for file in others]
    check_origin(sources, identity, data)
    if own is not None and own.path == path and is_up_to_date(own, names, retry_failed):
        return None
    _check_rounding(sources, identity)
    if own is None or own.path == path or not is_whole(own, names, retry_failed):
        temporary = _create(partial, names, identity, data, sources, retry_failed)
        del own, sources  # Windows replaces no file that is mapped
        temporary.replace(partial)
    return CacheWriter(path)


def existing_cache(path: Path) -> FeatureCache | None:
    """Open what is at ``path``, begun or finished, if there is anything."""
    return next((FeatureCache(f) for f in (partial_path(path), path) if f.is_file()), None)


def say_what_is_gone(previous: FeatureCache | None, names: Sequence[str]) -> None:
    """Say aloud how many pictures of an earlier cache are no longer there."""
    if previous is not None:
        gone = len(previous) - int((previous.rows(names) >= 0).sum())
        if gone:
            say(f"pictures that are gone, their features dropped: {gone:,}", err=True)


def check_origin(caches: Sequence[FeatureCache], identity: EncoderIdentity, data: str) -> None:
    """Refuse caches of another encoder, or of another folder.

    Raises:
        UserError: there is one among them.
    """
    for cache in caches:
        mismatch = identity.mismatch(cache.identity)
        if mismatch is not None:
            raise UserError(
                f"{cache.path} was made by another encoder ({mismatch}); --force makes it anew, "
                "--output FILE keeps both"
            )
        if data != cache.data:
            raise UserError(
                f"{cache.path} is of the pictures in {cache.data}, not of those in {data}; "
                "--output FILE makes one for these, --force replaces it"
            )


def is_up_to_date(cache: FeatureCache, names: Sequence[str], retry_failed: bool) -> bool:
    """Tell whether nothing is left to do for the pictures ``names``, in their order."""
    return cache.complete and is_whole(cache, names, retry_failed)


def is_whole(
    cache: FeatureCache, names: Sequence[str], retry_failed: bool, rows: range | None = None
) -> bool:
    """Tell whether a cache is of the pictures ``names``, in their order, and none of its rows,
    or of ``rows``, is damaged or is to be tried again.
    """
    if cache.images_sha256 != images_sha256(names):
        return False
    chosen = slice(0, len(cache)) if rows is None else slice(rows.start, rows.stop)
    status = cache.status[chosen]
    if retry_failed and (status == FAILED).any():
        return False
    return not len(cache.damaged_rows(chosen.start + numpy.flatnonzero(status == DONE)))


def _check_rounding(caches: Sequence[FeatureCache], identity: EncoderIdentity) -> None:
    """Refuse to go on with caches in another precision or by another engine than before."""
    for cache in caches:
        for option in ("precision", "engine"):
            before, now = getattr(cache.identity, option), getattr(identity, option)
            if before != now:
                raise UserError(
                    f"{cache.path} was begun with --{option} {before}, not {now}: give that to go "
                    "on with it; --force makes it anew, --output FILE keeps both"
                )


def _create(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    data: str,
    sources: Sequence[FeatureCache],
    retry_failed: bool,
) -> Path:
    """Lay out a whole cache for ``path`` and take over what ``sources`` hold of its pictures.

    Returns:
        The temporary file, to be moved to ``path``.
    """

    def allocate_features(file: h5py.File) -> None:
        _allocate(file, "features", (len(names), FEATURE_SIZE), numpy.dtype("<f2"))

    with lay_out(path, names, identity, data, allocate_features) as cache:
        for source in sources:
            _take_over(cache, source, retry_failed)
        cache.flush()
    return temporary_path(path)


@contextlib.contextmanager
def lay_out(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    data: str,
    make_features: Callable[[h5py.File], None],
) -> Iterator[FeatureCache]:
    """Write the temporary file of ``path`` with a place for everything, and open it for writing.

    When the block raises, the temporary file is removed.

    Args:
        path: the cache to be.
        names: its pictures, in the order of their bytes.
        identity: the encoder.
        data: the folder of the pictures.
        make_features: adds the dataset ``features`` to the file.

    Raises:
        UserError: the file cannot be written.
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
            make_features(file)
        _reserve(temporary)
        cache = FeatureCache(temporary, writable=True)
        cache._names[:] = encoded
        yield cache
    except OSError as error:
        _discard(temporary)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        _discard(temporary)
        raise


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # a path that is no path at all cannot be unlinked
        temporary.unlink(missing_ok=True)


def _take_over(cache: FeatureCache, previous: FeatureCache, retry_failed: bool) -> None:
    """Copy the good rows of ``previous`` to the rows of the same names that are not yet there."""
    usable = previous.status == DONE
    usable[previous.damaged_rows()] = False
    if not retry_failed:
        usable |= previous.status == FAILED
    rows = numpy.flatnonzero(usable)
    for start in range(0, len(rows), CHUNK):
        old = rows[start : start + CHUNK]
        new = cache.rows([previous.name(row) for row in old])
        wanted = (new >= 0) & (cache.status[new] == PENDING)
        old, new = old[wanted], new[wanted]
        cache.own_features[new] = previous.features[old]
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
