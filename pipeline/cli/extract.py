"""Stage 1: run InceptionV3 once over every image and store its 2048 features in HDF5."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import options
from pipeline.datasets.find_images import describe_skipped
from pipeline.datasets.image_sources import ImageFolder, open_source
from pipeline.datasets.tar_shards import is_elsewhere, is_tar_shards
from pipeline.utils.errors import UserError
from pipeline.utils.files import HDF5
from pipeline.utils.terminal import echo, echo_failure

if TYPE_CHECKING:
    import torch

    from pipeline.features.extraction import ExtractionResult
    from pipeline.models.encoder import Encoder
    from pipeline.models.encoder_identity import EncoderIdentity
    from pipeline.utils.distributed import World

NO_DATA = (
    "--data {data}: {problem}; --download downloads Flickr8k to it (1.1 GB), or unpack the Kaggle "
    "archive adityajn105/flickr8k there; --data FOLDER names your own images"
)

GROUPS = {
    "Encoder": ("weights", "engine", "precision"),
    "Broken images": ("on_error", "retry_failed"),
    "Machine": ("device", "batch_size", "workers"),
}


@options.command(GROUPS, resumable=True)
@click.option(
    "--data",
    type=options.DataPath(),
    default="data/flickr8k",
    help="Folder of images; sub-folders are searched too. Or tar shards, as of WebDataset: "
    "'shards/{0000..0099}.tar', on disk or at any URL that fsspec reads.",
)
@options.output(
    "--output", "The feature cache to write.  [default: data/features/NAME-OF-DATA.h5]", HDF5
)
@click.option(
    "--weights",
    default="auto",
    help="'imagenet' (torchvision's, downloaded once), 'pretrained' (those of the model that comes "
    "with the program), a torchvision inception_v3 state dict, a checkpoint of finetune_joint.py, "
    "or 'random' (untrained, for tests). auto: those that the cache was begun with, else "
    "imagenet, or pretrained if that cannot be downloaded.",
)
@options.device
@click.option(
    "--engine",
    type=click.Choice(["auto", "torch", "openvino"]),
    default="auto",
    help="Library that runs the network. auto: OpenVINO on a CPU, if it is installed (pip install "
    "-e '.[openvino]') and there are 200 images or more.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
    default="auto",
    help="Precision of the network. auto: bf16 on CPUs with AMX, where it is 3 times faster, and "
    "on GPUs; features are within cosine 0.999 of fp32. int8: with OpenVINO only; within cosine "
    "0.99, see docs/speed.md.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images per forward pass.  [default: 4 on a CPU, where small batches stay in its "
    "cache; 64 on a GPU]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that decode and encode images.  [default: one per core, at most 8]",
)
@click.option(
    "--on-error",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    help="skip: record an unreadable image and continue; fail: stop.",
)
@click.option("--retry-failed", is_flag=True, help="Try images again that failed before.")
@click.option("--force", is_flag=True, help="Start over, discarding the cache.")
@click.option("--download", is_flag=True, help="Download Flickr8k to --data first (resumable).")
def main(
    data: str,
    output: Path | None,
    weights: str,
    device: str,
    engine: str,
    precision: str,
    batch_size: int | None,
    workers: int | None,
    on_error: str,
    retry_failed: bool,
    force: bool,
    download: bool,
) -> None:
    """Extract InceptionV3 features of every image into one HDF5 cache.

    \b
    Examples:
      python extract_features.py
      python extract_features.py --download
      python extract_features.py --data photos --output data/features/photos.h5

    After an interruption, run the same command again to resume. Images added to the folder later
    are added to the cache.

    For several GPUs or machines, start it with torchrun: each process encodes a share into a
    shard beside the cache. On one CPU this gains nothing, as --workers already uses all cores.
    """
    from pipeline.utils.distributed import joined_world

    if force:
        options.refuse_given(["retry_failed"], "has no effect with --force, which starts over")
    if is_tar_shards(data):
        options.refuse_given(["download"], "needs a folder as --data")
    with joined_world() as world:
        if download:
            from pipeline.datasets.flickr8k import download_flickr8k

            if world.rank == 0:
                download_flickr8k(Path(data))
            world.barrier()
        if not is_tar_shards(data) and not Path(data).is_dir():
            raise UserError(NO_DATA.format(data=data, problem="no such folder"))
        source = open_source(data)
        if not source.names:
            raise UserError(NO_DATA.format(data=data, problem="no images there"))
        from pipeline.features.cache import default_cache_path
        from pipeline.features.extraction import Extraction, extract
        from pipeline.features.sharded_cache import resume_identity
        from pipeline.models.openvino import choose_engine
        from pipeline.utils.devices import (
            choose_device,
            choose_precision,
            default_workers,
            inference_batch_size,
        )

        output = output or default_cache_path(data)
        chosen = choose_device(device, world.local_rank)
        force = force and not world.restarted
        begun = None if force else resume_identity(output)
        if begun is not None and precision in ("auto", begun.precision):
            precision = begun.precision
            engine = begun.engine if engine == "auto" else engine
        precision = choose_precision(precision, chosen)
        engine = choose_engine(engine, chosen, len(source.names), precision)
        task = Extraction(
            source=source,
            names=source.names,
            output=output,
            encoder=_load_encoder(weights, precision, begun, chosen, world),
            batch_size=batch_size or inference_batch_size(chosen),
            workers=workers or default_workers(chosen),
            engine=engine,
            on_error=on_error,
            force=force,
            retry_failed=retry_failed,
        )
        result = extract(task, world)
    if world.rank == 0:
        _report(result, source.skipped if isinstance(source, ImageFolder) else Counter())


def _load_encoder(
    weights: str, precision: str, begun: EncoderIdentity | None, device: torch.device, world: World
) -> Encoder:
    """Load the encoder; auto: the weights that the cache was started with, if available."""
    from pipeline.models.encoder import NAMED_WEIGHTS, load_encoder

    if begun is not None:
        source = begun.weights_source
        here = not is_elsewhere(source) and Path(source).is_file()
        if weights == "auto" and (source in NAMED_WEIGHTS or here):
            weights = source
    encoder = world.local_main_first(lambda: load_encoder(weights, precision)).to(device)
    if len(set(world.all_gather(encoder.source))) > 1:
        raise UserError(
            "the machines of this job found different weights; name some with --weights"
        )
    if weights == "random" and world.rank == 0:
        echo("The encoder is untrained (--weights random): captions will be poor.", err=True)
    return encoder


def _report(result: ExtractionResult, skipped: Counter[str]) -> None:
    """Report what was done; exit with code 1 if images could not be read."""
    if skipped:
        echo(describe_skipped(skipped), err=True)
    cache, failures = result.cache, result.cache.failures()
    count = len(cache) - len(failures)
    echo(
        f"{cache.path}: complete, {count:,} image{'' if count == 1 else 's'} ({result.encoded:,} "
        f"encoded now, {count - result.encoded:,} before; {cache.identity.precision}, "
        f"{cache.identity.engine})",
        err=True,
    )
    for name, reason in failures.items():
        echo_failure(name, reason)
    if failures:
        echo(f"{len(failures)} could not be read; --retry-failed tries them again", err=True)
        sys.exit(1)
