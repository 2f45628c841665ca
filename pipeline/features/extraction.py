"""Stage 1: encode every image once into a feature cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from pipeline.datasets.image_sources import ImageSource, stamps_of, stop_if_unreachable
from pipeline.features.cache import PENDING, FeatureCache, is_foreign
from pipeline.features.cache_writer import CacheWriter, is_current, open_writer
from pipeline.features.encode_images import encode_batches
from pipeline.features.sharded_cache import (
    combine_shards,
    earlier_work,
    remove_superseded,
    shard_path,
    shares,
)
from pipeline.models.encoder import Encoder
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import InputError, UserError
from pipeline.utils.files import locked
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo


@dataclass
class ExtractionResult:
    """What an extraction did."""

    cache: FeatureCache  # complete
    encoded: int  # images that went through the network in this run
    kept: int  # images whose features were there before


@dataclass(frozen=True)
class Extraction:
    """What to extract, and how."""

    source: ImageSource
    names: Sequence[str]  # in byte order; ``source.names`` are all of them
    output: Path  # the HDF5 file; its name ends in ``.partial`` until it is complete
    encoder: Encoder  # extraction folds BatchNorm into its weights
    batch_size: int  # images per forward pass
    workers: int  # threads that decode and encode
    engine: str = "torch"  # or ``openvino``
    on_error: str = "skip"  # record unreadable images as failed; ``fail``: stop at the first
    force: bool = False  # start over, whatever is there
    retry_failed: bool = False  # retry images that an earlier run recorded as failed


def extract(task: Extraction, world: World = SINGLE_PROCESS) -> ExtractionResult:
    """Encode images into a cache, keeping the work of any earlier run.

    Every process of ``world`` calls this. If there are several, each makes a shard, and rank 0
    combines the complete shards into one cache: see ``sharded_cache``. The result is the same for
    all processes, its counts summed over them.

    Raises:
        UserError: a cache of another encoder or folder at ``output``; another program is at work
            on it; another process ended early, or sees other images.
        InputError: an unreadable image, with ``on_error="fail"``.
    """
    task.encoder.engine = task.engine
    output = task.output
    if output.is_dir():
        raise UserError(f"{output}: is a folder; --output names the file to write")
    if output.is_file() and is_foreign(output):
        raise UserError(f"{output}: holds something else and is not replaced; name another file")
    with locked(output, world):
        names_hash = hashlib.sha256("\0".join(task.names).encode("utf-8", "surrogateescape"))
        world.refuse_differences({"the images of --data": names_hash.hexdigest()})
        parts = shares(len(task.names), task.batch_size, world.size)
        shards = [shard_path(output, number, len(parts)) for number in range(len(parts))]
        mine = parts[world.rank] if world.rank < len(parts) else range(0)
        path = output if world.size == 1 else shards[min(world.rank, len(parts) - 1)]
        names = task.names[mine.start : mine.stop]
        stamps = stamps_of(task.source, names)
        earlier = [] if task.force else earlier_work(path, output)
        for cache in earlier:
            _check_origin(cache, task, names, stamps)
        whole = next((cache for cache in earlier if cache.path == output), None)
        if whole is not None:
            first, count = mine.start, len(task.names)
            current = is_current(whole, names, stamps, task.retry_failed, first, count)
            if world.total(current) == world.size:
                return ExtractionResult(whole, encoded=0, kept=count)
        _echo_changes(earlier, names, stamps, world)
        for cache in earlier:
            _check_rounding(cache, task.encoder.identity)
        identity, origin = task.encoder.identity, task.source.origin
        writer = None
        if mine:
            retry = task.retry_failed
            writer = open_writer(path, names, identity, origin, stamps, earlier, retry)
        # No shard may go away before every process has copied what it needs from it.
        world.barrier()
        encoded, kept = _encode_pending(task, writer, world.rank > 0) if writer else (0, 0)
        encoded, kept = world.total(encoded), world.total(kept)
        if whole is not None and whole.shards and world.rank == 0:
            output.unlink(missing_ok=True)  # some of its shards are about to be replaced
        world.barrier()
        if writer is not None:
            writer.finish()
        world.barrier()
        if world.rank == 0:
            if world.size > 1:
                combine_shards(output, shards)
            remove_superseded(FeatureCache(output))
        world.barrier()
        return ExtractionResult(FeatureCache(output), encoded, kept)


def _check_origin(
    cache: FeatureCache, task: Extraction, names: Sequence[str], stamps: numpy.ndarray
) -> None:
    """Raise UserError for a cache of another encoder, or of another folder that was not moved."""
    mismatch = task.encoder.identity.mismatch(cache.identity)
    if mismatch is not None:
        raise UserError(
            f"{cache.path} was made by another encoder ({mismatch}); --force makes it anew, "
            "--output FILE keeps both"
        )
    if task.source.origin != cache.data:
        rows = cache.rows(names)
        known = stamps[rows >= 0]
        # Images in a moved folder keep their sizes and times.
        if not known.any() or (cache.column("stamps")[rows[rows >= 0]] != known).any():
            raise UserError(
                f"{cache.path} is of the images in {cache.data}, not of those in "
                f"{task.source.origin}; --output FILE makes one for these, --force replaces it"
            )


def _check_rounding(cache: FeatureCache, identity: EncoderIdentity) -> None:
    """Raise UserError if a cache was begun in another precision or by another engine."""
    for option in ("precision", "engine"):
        before, now = getattr(cache.identity, option), getattr(identity, option)
        if before != now:
            raise UserError(
                f"{cache.path} was begun with --{option} {before}, not {now}: give that to go "
                "on with it; --force makes it anew, --output FILE keeps both"
            )


def _echo_changes(
    earlier: Sequence[FeatureCache], names: Sequence[str], stamps: numpy.ndarray, world: World
) -> None:
    """Print how many images of the earlier cache are no longer there, or have changed."""
    whole = next((cache for cache in earlier if ".shard-" not in cache.path.name), None)
    found = changed = 0
    if whole is not None:
        rows = whole.rows(names)
        found = int((rows >= 0).sum())
        changed = int(whole.changed(rows[rows >= 0], stamps[rows >= 0]).sum())
    found, changed = world.total(found), world.total(changed)
    gone = len(whole) - found if whole is not None else 0
    if world.rank == 0 and gone:
        echo(f"images that are gone, their features dropped: {gone:,}", err=True)
    if world.rank == 0 and changed:
        echo(f"images that have changed, to be encoded again: {changed:,}", err=True)


def _encode_pending(task: Extraction, writer: CacheWriter, quiet: bool) -> tuple[int, int]:
    """Encode a cache's pending images; return how many were encoded, and how many were done."""
    task.encoder.for_inference(task.engine)
    cache, encoded = writer.cache, 0
    finished = int((cache.status != PENDING).sum())
    batches = (
        [(row, task.source.image(cache.name(row))) for row in rows]
        for rows in writer.pending_batches(task.batch_size)
    )
    bar = progress_bar(
        total=len(cache),
        initial=finished,
        unit="image",
        smoothing=0.05,
        desc="extracting",
        disable=quiet,
    )
    try:
        with bar:
            for batch in encode_batches(task.encoder, batches, task.workers):
                done = writer.write(batch.keys, batch.features, {})
                for row, reason in batch.failures.items():
                    image = task.source.image(cache.name(row))
                    stop_if_unreachable(image)
                    if task.on_error == "fail":
                        raise InputError(
                            f"{image}: {reason} (--on-error skip records it and continues; what is "
                            "done is kept)"
                        )
                done += writer.write([], batch.features[:0], batch.failures)
                bar.update(done)
                encoded += len(batch.keys)
        writer.commit()
    except BaseException:
        with contextlib.suppress(UserError):  # the error that stops the work is the one to report
            writer.commit()
        raise
    return encoded, finished
