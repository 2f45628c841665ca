"""A feature cache made by several processes: a shard each, and one file that shows them as one.

Process r of W makes ``NAME.h5.shard-r-of-W``, itself a feature cache of a part of the images,
and resumable as any. When all are whole, ``NAME.h5`` is written: names, status, reasons and
checksums of all rows, and ``features`` as an HDF5 virtual dataset over the shards, which stay
beside it. Every process encodes whole batches of the single-process run, so that each row is
the same to the bit.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy

from pipeline.features.cache import CHUNK, FeatureCache, partial_path
from pipeline.features.cache_columns import FEATURE_TYPE
from pipeline.features.cache_file import create_file
from pipeline.features.cache_writer import existing_cache
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.files import move_into_place, temporary_path


def shard_path(path: Path, number: int, count: int) -> Path:
    """Give the file of shard ``number`` of ``count`` of the cache ``path``."""
    return path.with_name(f"{path.name}.shard-{number}-of-{count}")


def shard_files(path: Path) -> list[Path]:
    """List the shards, begun or finished, of whatever number of processes, of a cache."""
    pattern = re.compile(re.escape(path.name) + r"\.shard-\d+-of-\d+(\.partial)?")
    if not path.parent.is_dir():
        return []
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def resume_identity(path: Path) -> EncoderIdentity | None:
    """Tell by which encoder a cache at ``path``, or a shard of it, was begun, if one was."""
    whole = existing_cache(path)
    if whole is not None:
        return whole.identity
    return next((FeatureCache(file).identity for file in shard_files(path)), None)


def shares(images: int, batch_size: int, processes: int) -> list[range]:
    """Divide rows among processes: one range each, of whole batches, as even as that allows.

    There are fewer ranges than processes where there are fewer batches.
    """
    batches = -(-images // batch_size)
    count = min(processes, batches)
    cuts = [min(images, batches * number // count * batch_size) for number in range(count + 1)]
    return [range(*pair) for pair in itertools.pairwise(cuts)]


def combine_shards(path: Path, shards: Sequence[Path]) -> FeatureCache:
    """Write the cache ``path`` over its finished shards, in the order of their rows."""
    parts = [FeatureCache(shard) for shard in shards]
    names = [name for part in parts for name in part.names()]
    stamps = numpy.concatenate([part.stamps for part in parts])

    def make_features(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((len(names), FEATURE_SIZE), FEATURE_TYPE)
        first = 0
        for part in parts:
            last = first + len(part)
            # By its bare name: HDF5 looks beside the file that has the virtual dataset.
            source = h5py.VirtualSource(
                part.path.name, "features", (len(part), FEATURE_SIZE), FEATURE_TYPE
            )
            layout[first:last] = source
            first = last
        file.create_virtual_dataset("features", layout)

    with create_file(path, names, stamps, parts[0].identity, parts[0].data, make_features) as cache:
        first = 0
        for part in parts:
            for start in range(0, len(part), CHUNK):
                old = slice(start, min(start + CHUNK, len(part)))
                new = slice(first + old.start, first + old.stop)
                cache._crc[new] = part._crc[old]
                cache._reason[new] = part._reason[old]
                cache.status[new] = part.status[old]
                cache.seal(numpy.arange(new.start, new.stop))
            first += len(part)
        cache._complete[0] = 1
        cache.flush()
    move_into_place(temporary_path(path), path)
    return FeatureCache(path)


def remove_superseded(cache: FeatureCache) -> None:
    """Delete the shards and the partial cache that a finished cache no longer needs."""
    for file in [partial_path(cache.path), *shard_files(cache.path)]:
        if file not in cache.shards:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
