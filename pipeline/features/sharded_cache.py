"""A feature cache made by several processes: one shard each, and one file over them all.

Process r of W makes ``NAME.h5.shard-r-of-W``, itself a resumable feature cache of a part of the
images. When all are complete, ``NAME.h5`` is written: all columns of all rows, with ``features`` as
an HDF5 virtual dataset over the shards, which stay beside it. Every process encodes whole batches
of the single-process run, so that each row is bit-identical.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy

from pipeline.features.cache import FeatureCache, partial_path
from pipeline.features.cache_writer import create_file
from pipeline.models.encoder_identity import EncoderIdentity


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return the file of shard ``number`` of ``count`` of the cache ``path``."""
    return path.with_name(f"{path.name}.shard-{number}-of-{count}")


def shard_files(path: Path) -> list[Path]:
    """Return the shards of a cache, partial or complete, by any number of processes."""
    pattern = re.compile(re.escape(path.name) + r"\.shard-\d+-of-\d+(\.partial)?")
    if not path.parent.is_dir():
        return []
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def earlier_work(path: Path, output: Path) -> list[FeatureCache]:
    """Open the caches with rows for ``path``, which is ``output`` or one of its shards.

    These are the file itself, partial or else complete, and those that other processes began.
    """
    own = (partial_path(path), path)
    files = [file for file in own if file.is_file()][:1]
    if path != output or not output.is_file():  # else it was made from all there was
        others = (partial_path(output), output, *shard_files(output))
        files += [file for file in others if file.is_file() and file not in own]
    return [FeatureCache(file) for file in files]


def resume_identity(path: Path) -> EncoderIdentity | None:
    """Return the encoder that began a cache at ``path`` or a shard of it, None if there is none."""
    files = [file for file in (partial_path(path), path) if file.is_file()] or shard_files(path)
    return FeatureCache(files[0]).identity if files else None


def shares(images: int, batch_size: int, processes: int) -> list[range]:
    """Divide rows among processes: one range of whole batches each, of nearly equal sizes.

    There are fewer ranges than processes if there are fewer batches.
    """
    batches = -(-images // batch_size)
    count = min(processes, batches)
    cuts = [min(images, batches * number // count * batch_size) for number in range(count + 1)]
    return [range(*pair) for pair in itertools.pairwise(cuts)]


def combine_shards(path: Path, shards: Sequence[Path]) -> FeatureCache:
    """Write the cache ``path`` over its complete shards, in the order of their rows."""
    parts = [FeatureCache(shard) for shard in shards]
    names = [name for part in parts for name in part.names()]
    stamps = numpy.concatenate([part.column("stamps") for part in parts])
    first = parts[0]
    create_file(path, names, first.identity, first.data, stamps, sources=parts, shards=parts)
    return FeatureCache(path)


def remove_superseded(cache: FeatureCache) -> None:
    """Delete the shards and the partial cache that a complete cache no longer needs."""
    for file in [partial_path(cache.path), *shard_files(cache.path)]:
        if file not in cache.shards:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
