"""Stage 1: every image through the encoder once, into one feature cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from pipeline.datasets.image_sources import ImageSource, stamps_of, stop_if_unreachable
from pipeline.datasets.images import ImageRef
from pipeline.features.cache import PENDING, FeatureCache, images_sha256, partial_path
from pipeline.features.cache_writer import (
    CacheWriter,
    check_origin,
    echo_changes,
    existing_cache,
    is_complete,
    open_cache_writer,
)
from pipeline.features.encode_images import encode_batches
from pipeline.features.sharded_cache import (
    combine_shards,
    remove_superseded,
    shard_files,
    shard_path,
    shares,
)
from pipeline.models.encoder import Encoder
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import InputError, UserError
from pipeline.utils.files import locked
from pipeline.utils.progress import progress_bar


@dataclass
class ExtractionResult:
    """What an extraction did.

    Attributes:
        cache: the finished cache.
        encoded: images that went through the network in this run.
        kept: images whose features were there before.
    """

    cache: FeatureCache
    encoded: int
    kept: int


@dataclass(frozen=True)
class Extraction:
    """What is to be extracted, and how.

    Attributes:
        source: where the images are.
        names: which of them, in the order of their bytes; all are ``source.names``.
        output: the HDF5 file; ``.partial`` is added to its name until it is complete.
        encoder: the network; BatchNorm is folded into its weights in the work.
        batch_size: images a forward pass.
        workers: threads that decode and encode.
        engine: what runs the network: ``torch`` or ``openvino``.
        on_error: ``skip`` records an unreadable image as failed, ``fail`` stops at it.
        force: begin anew whatever is there.
        retry_failed: try the images again that an earlier run recorded as failed.
    """

    source: ImageSource
    names: Sequence[str]
    output: Path
    encoder: Encoder
    batch_size: int
    workers: int
    engine: str = "torch"
    on_error: str = "skip"
    force: bool = False
    retry_failed: bool = False


def extract(task: Extraction, world: World = SINGLE_PROCESS) -> ExtractionResult:
    """Encode images into a cache; go on where a kill left off.

    Raises:
        UserError: a cache of another encoder or folder at ``output``; another process is at work
            on it.
        InputError: an unreadable image, with ``on_error="fail"``.
    """
    with locked(task.output, world):
        return _extract(task, world)


def _extract(task: Extraction, world: World) -> ExtractionResult:
    task.encoder.engine = task.engine
    stamps = stamps_of(task.source, task.names)
    if not task.force:
        echo_changes(existing_cache(task.output), task.names, stamps)
    writer = _open_writer(task, task.output, task.names, stamps)
    if writer is None:
        return ExtractionResult(FeatureCache(task.output), encoded=0, kept=len(task.names))
    task.encoder.for_inference(task.engine)
    encoded, kept = _encode_pending(task, writer)
    cache = writer.finish()
    remove_superseded(cache)
    return ExtractionResult(cache, encoded, kept)


def extract_share(task: Extraction, world: World) -> ExtractionResult:
    """Encode this process's share of the images; to be called by every process of ``job``.

    Each makes a shard, and when all are whole rank 0 makes one cache of them: see
    ``feature_shards``. Work of any earlier run, by whatever number of processes, is kept.

    Returns:
        The cache, the same for all; what was done is summed over all processes.

    Raises:
        UserError: see ``extract``; another process ended early, or sees other images.
        InputError: see ``extract``.
    """
    with locked(task.output, world):
        return _extract_share(task, world)


def _extract_share(task: Extraction, world: World) -> ExtractionResult:
    task.encoder.engine = task.engine
    if len(set(world.all_gather(images_sha256(task.names)))) > 1:
        raise UserError(
            f"--data {task.source.origin}: the processes of this job see different images"
        )
    parts = shares(len(task.names), task.batch_size, world.size)
    shards = [shard_path(task.output, number, len(parts)) for number in range(len(parts))]
    mine = parts[world.rank] if world.rank < len(parts) else range(0)
    names = [task.names[row] for row in mine]
    stamps = stamps_of(task.source, names)
    finished = FeatureCache(task.output) if task.output.is_file() and not task.force else None
    if finished is not None:
        check_origin([finished], task.encoder.identity, task.source.origin)
        whole = is_complete(finished, task.names, task.retry_failed, stamps, mine)
        if world.total(whole) == world.size:
            return ExtractionResult(finished, encoded=0, kept=len(task.names))
        if world.rank == 0:
            echo_changes(finished, task.names, stamps_of(task.source, task.names))
    writer, encoded, kept = None, 0, len(mine)
    if mine:
        writer = _open_writer(task, shards[world.rank], names, stamps)
    # No one's shard may go away before all have taken over what they need of it.
    world.barrier()
    if writer is not None:
        task.encoder.for_inference(task.engine)
        encoded, kept = _encode_pending(task, writer, quiet=world.rank > 0)
        writer.finish()
    world.barrier()
    if world.rank == 0:
        remove_superseded(combine_shards(task.output, shards))
    encoded, kept = world.total(encoded), world.total(kept)
    return ExtractionResult(FeatureCache(task.output), encoded, kept)


def _open_writer(
    task: Extraction, path: Path, names: Sequence[str], stamps: numpy.ndarray
) -> CacheWriter | None:
    """Open the whole cache or a shard of it, with all that earlier runs left."""
    related = [partial_path(task.output), task.output, *shard_files(task.output)]
    if path == task.output and path.is_file():
        related = []  # it is complete, or was made of all that there is
    own = (path, partial_path(path))
    return open_cache_writer(
        path,
        names,
        task.encoder.identity,
        task.force,
        task.retry_failed,
        task.source.origin,
        [] if task.force else [f for f in related if f not in own and f.is_file()],
        stamps,
    )


def _encode_pending(task: Extraction, writer: CacheWriter, quiet: bool = False) -> tuple[int, int]:
    """Encode what a cache lacks; returns how many images were, and how many were there."""
    finished = int((writer.cache.status != PENDING).sum())
    batches = (
        [(row, task.source.image(writer.cache.name(row))) for row in rows]
        for rows in writer.pending_batches(task.batch_size)
    )
    encoded = 0
    bar = progress_bar(
        total=len(writer.cache),
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
                    _judge_failure(task, task.source.image(writer.cache.name(row)), reason)
                done += writer.write([], batch.features[:0], batch.failures)
                bar.update(done)
                encoded += len(batch.keys)
    except BaseException:
        with contextlib.suppress(UserError):  # what stops the work is told already
            writer.commit()
        raise
    return encoded, finished


def _judge_failure(task: Extraction, image: ImageRef, reason: str) -> None:
    """Stop at an image that cannot be read, where that is asked for or others would follow.

    Raises:
        InputError, UserError: it has to stop; what is done is kept.
    """
    stop_if_unreachable(image)
    if task.on_error == "fail":
        raise InputError(
            f"{image}: {reason} (--on-error skip records it and goes on; what is done is kept)"
        )
