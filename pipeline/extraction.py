"""Stage 1: every picture through the encoder once, into one feature cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.encoder import Encoder, encode_files
from pipeline.errors import InputError
from pipeline.features import PENDING, FeatureCache, open_cache_writer
from pipeline.progress import progress_bar


@dataclass
class ExtractionResult:
    """What an extraction did.

    Attributes:
        cache: the finished cache.
        encoded: pictures that went through the network in this run.
        kept: pictures whose features were there before.
    """

    cache: FeatureCache
    encoded: int
    kept: int


def extract(
    data: Path,
    names: Sequence[str],
    output: Path,
    encoder: Encoder,
    batch_size: int,
    workers: int,
    engine: str = "torch",
    on_error: str = "skip",
    force: bool = False,
    retry_failed: bool = False,
) -> ExtractionResult:
    """Encode pictures into the cache ``output``; go on where a kill left off.

    Args:
        data: folder of pictures.
        names: the pictures, as paths relative to ``data``: see ``images.find_images``.
        output: the HDF5 file; ``.partial`` is added to its name until it is complete.
        encoder: the network; BatchNorm is folded into its weights here.
        batch_size: pictures a forward pass.
        workers: threads that decode and encode.
        engine: what runs the network: ``torch`` or ``openvino``.
        on_error: ``skip`` records an unreadable picture as failed, ``fail`` stops at it.
        force: begin anew whatever is there.
        retry_failed: try the pictures again that an earlier run recorded as failed.

    Raises:
        UserError: a cache of another encoder at ``output``.
        InputError: an unreadable picture, with ``on_error="fail"``.
    """
    encoder.engine = engine
    writer = open_cache_writer(
        output, names, encoder.identity, force, retry_failed, str(data.resolve())
    )
    if writer is None:
        return ExtractionResult(FeatureCache(output), encoded=0, kept=len(names))
    encoder.for_inference(engine)
    finished = int((writer.cache.status != PENDING).sum())
    batches = (
        [(row, data / writer.cache.name(row)) for row in rows]
        for rows in writer.pending_batches(batch_size)
    )
    encoded = 0
    bar = progress_bar(
        total=len(names), initial=finished, unit="image", smoothing=0.05, desc="extracting"
    )
    with bar:
        for batch in encode_files(encoder, batches, workers):
            if batch.failures and on_error == "fail":
                writer.write(batch.keys, batch.features, {})
                writer.commit()
                row, reason = next(iter(batch.failures.items()))
                raise InputError(
                    f"{data / writer.cache.name(row)}: {reason} (--on-error skip records it and "
                    "goes on; what is done is kept)"
                )
            bar.update(writer.write(batch.keys, batch.features, batch.failures))
            encoded += len(batch.keys)
    cache = writer.finish()
    return ExtractionResult(cache, encoded, kept=finished)
