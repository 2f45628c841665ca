"""Laying out the file of a new feature cache, with a place for all that ``features`` lists."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy

from pipeline.features.cache import REASON_BYTES, SCHEMA_VERSION, FeatureCache, images_sha256
from pipeline.features.cache_columns import seal_structure
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.errors import UserError
from pipeline.utils.files import temporary_path

# Bytes of a row beside its name and reason, and more than a file has beside its rows.
ROW_BYTES = 2 * FEATURE_SIZE + sum((1, 4, 16, 4))
MOST_STRUCTURE = 1 << 14


@contextlib.contextmanager
def create_file(
    path: Path,
    names: Sequence[str],
    stamps: numpy.ndarray,
    identity: EncoderIdentity,
    data: str,
    make_features: Callable[[h5py.File], None],
) -> Iterator[FeatureCache]:
    """Write the temporary file of ``path`` with a place for everything, and open it for writing.

    When the block raises, the temporary file is removed.

    Args:
        path: the cache to be.
        names: its images, in the order of their bytes.
        stamps: int64 (N, 2): how these are now, see ``features``.
        identity: the encoder.
        data: the folder of the images.
        make_features: adds the dataset ``features`` to the file.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = temporary_path(path)
    encoded = [os.fsencode(name) for name in names]
    count, longest = len(names), max(map(len, encoded), default=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before HDF5 begins, whose errors of a full disk are long, and leave the file open.
        _reserve(temporary, "wb", MOST_STRUCTURE + count * (longest + REASON_BYTES + ROW_BYTES))
        try:
            with h5py.File(temporary, "w") as file:
                for field, value in {**asdict(identity), "data": data}.items():
                    file.attrs[field] = value.encode("utf-8", "replace").decode()
                file.attrs["schema_version"] = SCHEMA_VERSION
                file.attrs["images_sha256"] = images_sha256(names)
                allocate(file, "names", (count,), h5py.string_dtype("utf-8", longest))
                allocate(file, "status", (count,), numpy.dtype("u1"))
                allocate(file, "reason", (count,), h5py.string_dtype("utf-8", REASON_BYTES))
                allocate(file, "crc", (count,), numpy.dtype("<u4"))
                allocate(file, "stamps", (count, 2), numpy.dtype("<i8"))
                allocate(file, "row_crc", (count,), numpy.dtype("<u4"))
                allocate(file, "layout_crc", (1,), numpy.dtype("<u4"))
                allocate(file, "complete", (1,), numpy.dtype("u1"))
                make_features(file)
        except RuntimeError as error:  # where closing the file fails
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        _reserve(temporary, "r+b", temporary.stat().st_size)
        seal_structure(temporary)
        cache = FeatureCache(temporary, writable=True)
        cache._names[:] = encoded
        cache.stamps[:] = stamps
        yield cache
    except OSError as error:
        _discard(temporary)
        # The text of h5py's own errors has several lines.
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{path}: cannot be written ({reason})") from error
    except BaseException:
        _discard(temporary)
        raise


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # a path that is no path at all cannot be unlinked
        temporary.unlink(missing_ok=True)


def allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: numpy.dtype) -> None:
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


def _reserve(path: Path, mode: str, size: int) -> None:
    """Take a file's disk space now, so that a full disk shows before the work, not amid it.

    Writing to a mapped page that has no block on a full disk would kill the process.
    """
    with path.open(mode) as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, max(size, 1))
        except AttributeError:
            return  # macOS and Windows have no such call
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
