"""Filling a feature cache: laid out whole at first, then written row by row, safe at any kill.

``features`` says what is in the file; ``open_cache_writer`` keeps whatever of it was done before.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy

from pipeline.features.cache import (
    CHUNK,
    DONE,
    FAILED,
    PENDING,
    REASON_BYTES,
    FeatureCache,
    partial_path,
)
from pipeline.features.cache_columns import FEATURE_TYPE
from pipeline.features.cache_file import allocate, create_file
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.errors import UserError
from pipeline.utils.files import move_into_place, temporary_path
from pipeline.utils.terminal import echo

# Seconds between two commits; a kill costs at most the work of one such span.
COMMIT_INTERVAL = 1.0
# What stands where an image failed, and its checksum.
NO_FEATURES = numpy.zeros(FEATURE_SIZE, FEATURE_TYPE)
NO_FEATURES_CRC = zlib.crc32(NO_FEATURES.tobytes())


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
        values, mapped = features.astype(FEATURE_TYPE), self.cache.own_features
        reasons = self.cache._reason
        for row, value in zip(rows, values, strict=True):
            mapped[row] = value
            self.cache._crc[row] = zlib.crc32(value)
            reasons[row] = b""
            self._uncommitted[row] = DONE
        for row, reason in failures.items():
            mapped[row] = NO_FEATURES
            self.cache._crc[row] = NO_FEATURES_CRC
            encoded = reason.encode("utf-8", "replace")[:REASON_BYTES]
            reasons[row] = encoded.decode("utf-8", "ignore").encode()
            self._uncommitted[row] = FAILED
        if time.monotonic() - self._last_commit > COMMIT_INTERVAL:
            self.commit()
        return news

    def commit(self) -> None:
        """Force what was written to disk, then mark it done.

        Raises:
            UserError: that cannot be, or the file is gone.
        """
        path = self.cache.path
        if not path.is_file():
            raise UserError(f"{path}: is gone; the same command begins it anew")
        try:
            self.cache.flush()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        rows = numpy.array(list(self._uncommitted), dtype=numpy.int64)
        self.cache.status[rows] = list(self._uncommitted.values())
        self.cache.seal(rows)
        self._uncommitted.clear()
        self._last_commit = time.monotonic()

    def finish(self) -> FeatureCache:
        """Mark the cache complete, move it to its final name, and open it there."""
        self.commit()
        self.cache.flush()
        self.cache._complete[0] = 1
        self.cache._complete.flush()
        partial = self.cache.path
        del self.cache  # Windows moves no file that is mapped
        move_into_place(partial, self.final_path)
        return FeatureCache(self.final_path)


def open_cache_writer(
    path: Path,
    names: Sequence[str],
    identity: EncoderIdentity,
    force: bool,
    retry_failed: bool,
    data: str = "",
    others: Sequence[Path] = (),
    stamps: numpy.ndarray | None = None,
) -> CacheWriter | None:
    """Open the cache at ``path`` for the images ``names``, keeping all work already done.

    A finished or partial cache by the same encoder gives the rows that it has; images
    added or changed since are pending, images gone are left out, damaged rows are made again.
    ``data`` is the folder of the images: one cache is for one folder, as names recur in others.
    ``others`` are further caches, finished or partial, that may have rows of these images.
    ``stamps``, int64 (N, 2), tell how ``names`` are now: see ``features``.

    Returns:
        A writer, or None when the cache is complete as it stands.

    Raises:
        UserError: a cache there was made by another encoder or of another folder, and
            ``force`` is not set.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output names the file to write")
    partial = partial_path(path)
    order = sorted(range(len(names)), key=lambda number: os.fsencode(names[number]))
    names = [names[number] for number in order]
    stamps = numpy.zeros((len(names), 2), dtype=numpy.int64) if stamps is None else stamps[order]
    if force:
        with contextlib.suppress(OSError):  # where that is not allowed, the next line says so
            partial.unlink()
        temporary = _create(partial, names, stamps, identity, data, [], retry_failed)
        move_into_place(temporary, partial)
        return CacheWriter(path)
    own = existing_cache(path)
    sources = [own] if own is not None else []
    sources += [FeatureCache(file) for file in others]
    check_origin(sources, identity, data)
    if (
        own is not None
        and own.path == path
        and own.complete
        and is_complete(own, names, retry_failed, stamps)
    ):
        return None
    _check_rounding(sources, identity)
    if own is None or own.path == path or not is_complete(own, names, retry_failed, stamps):
        temporary = _create(partial, names, stamps, identity, data, sources, retry_failed)
        del own, sources  # Windows replaces no file that is mapped
        move_into_place(temporary, partial)
    return CacheWriter(path)


def existing_cache(path: Path) -> FeatureCache | None:
    """Open what is at ``path``, begun or finished, if there is anything."""
    return next((FeatureCache(f) for f in (partial_path(path), path) if f.is_file()), None)


def echo_changes(
    previous: FeatureCache | None, names: Sequence[str], stamps: numpy.ndarray
) -> None:
    """Say aloud how many images of an earlier cache are no longer there, or others now."""
    if previous is not None:
        rows = previous.rows(names)
        gone = len(previous) - int((rows >= 0).sum())
        if gone:
            echo(f"images that are gone, their features dropped: {gone:,}", err=True)
        changed = int(previous.changed(rows[rows >= 0], stamps[rows >= 0]).sum())
        if changed:
            echo(f"images that have changed, to be encoded again: {changed:,}", err=True)


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
                f"{cache.path} is of the images in {cache.data}, not of those in {data}; "
                "--output FILE makes one for these, --force replaces it"
            )


def is_complete(
    cache: FeatureCache,
    names: Sequence[str],
    retry_failed: bool,
    stamps: numpy.ndarray,
    rows: range | None = None,
) -> bool:
    """Tell whether a cache is of the images ``names``, in their order, and none of its rows,
    or of ``rows``, is damaged or is to be made again; ``stamps`` are those of these rows.
    """
    if not numpy.array_equal(cache.rows(names), numpy.arange(len(cache))):
        return False
    chosen = numpy.arange(len(cache)) if rows is None else numpy.arange(rows.start, rows.stop)
    if cache.changed(chosen, stamps).any():
        return False
    if not cache.complete:
        chosen = chosen[cache.status[chosen] != PENDING]
    if retry_failed and (cache.status[chosen] == FAILED).any():
        return False
    return not len(cache.damaged_rows(chosen))


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
    stamps: numpy.ndarray,
    identity: EncoderIdentity,
    data: str,
    sources: Sequence[FeatureCache],
    retry_failed: bool,
) -> Path:
    """Lay out a whole cache for ``path`` and take over what ``sources`` hold of its images.

    Returns:
        The temporary file, to be moved to ``path``.
    """

    def allocate_features(file: h5py.File) -> None:
        allocate(file, "features", (len(names), FEATURE_SIZE), FEATURE_TYPE)

    with create_file(path, names, stamps, identity, data, allocate_features) as cache:
        for source in sources:
            _take_over(cache, source, retry_failed)
        cache.flush()
    return temporary_path(path)


def _take_over(cache: FeatureCache, previous: FeatureCache, retry_failed: bool) -> None:
    """Copy the good rows of ``previous`` to the rows of the same names that are not yet there."""
    damaged = previous.damaged_rows()
    if len(damaged):
        echo(f"{previous.path}: damaged rows, to be made again: {len(damaged):,}", err=True)
    usable = previous.status == DONE
    if not retry_failed:
        usable |= previous.status == FAILED
    usable[damaged] = False
    rows = numpy.flatnonzero(usable)
    for start in range(0, len(rows), CHUNK):
        old = rows[start : start + CHUNK]
        new = cache.rows([previous.name(row) for row in old])
        wanted = (new >= 0) & (cache.status[new] == PENDING)
        wanted &= ~previous.changed(old, cache.stamps[new])
        old, new = old[wanted], new[wanted]
        done = previous.status[old] == DONE
        cache.own_features[new] = numpy.where(done[:, None], previous.features[old], NO_FEATURES)
        # Old caches have another checksum where there are no features.
        cache._crc[new] = numpy.where(done, previous._crc[old], NO_FEATURES_CRC)
        cache._reason[new] = previous._reason[old]
        cache.status[new] = previous.status[old]
        cache.seal(new)
