"""Stage 3, optional: train encoder and decoder together, on the images themselves."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.datasets.tar_shards import is_elsewhere, refuse_elsewhere
from pipeline.training.options import MACHINE, TRAINING, JointOptions
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo_failure


@options.command({TRAINING: (), MACHINE: ("weights", "workers", "tensorboard")}, resumable=True)
@click.option(
    "--start",
    type=click.Path(),
    multiple=True,
    default=["runs/decoder"],
    help="What to start from: a run folder of train_decoder.py, a checkpoint, or 'pretrained', the "
    "model that comes with the program. Given several times, for runs that differ in their seed, "
    "all their decoders are trained on one encoder and caption as an ensemble.",
)
@click.option(
    "--data",
    type=options.DataPath(),
    help="Folder, or tar shards, with images and captions.  [default: that of the starting run]",
)
@options.captions
@options.encoding
@options.weights
@options.path("--run", "Run folder to write, or to resume.", default="runs/joint")
@options.from_dataclass(JointOptions)
@options.device
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that decode images.  [default: one per core, at most 8]",
)
@options.tensorboard
@options.force
def main(
    start: tuple[str, ...],
    data: str | None,
    captions: tuple[Path, ...],
    encoding: str | None,
    run: Path,
    device: str,
    workers: int | None,
    tensorboard: bool,
    force: bool,
    **chosen: Any,
) -> None:
    """Fine-tune encoder and decoder together, end to end, on images.

    \b
    Examples:
      python finetune_joint.py
      python finetune_joint.py --start pretrained --data photos --run runs/photos
      python finetune_joint.py --start runs/seed-0 --start runs/seed-1 --run runs/joint-2
      python finetune_joint.py --unfreeze-from Mixed_7a --epochs 4 --run runs/joint-7a

    The statistics of BatchNorm stay fixed. RUN/report.html shows curves and captions, also while
    the training runs. If it is stopped, the same command resumes it after the last finished epoch.

    For several GPUs or machines, start it with torchrun: each process reads its share of every
    batch's images, and the result is that of one process (docs/scale.md).
    """
    from pipeline.datasets.caption_table import caption_paths
    from pipeline.features.cache import default_cache_path
    from pipeline.reports.training_report import finish_run, make_callbacks
    from pipeline.training.finetune import finetune_joint, settings_to_start_from
    from pipeline.utils.devices import choose_device, choose_training_precision, default_workers
    from pipeline.utils.distributed import joined_world
    from pipeline.utils.files import locked

    with joined_world() as world:
        force = force and not world.restarted
        settings = settings_to_start_from(run, start, force)
        if data is None:
            if "data" not in settings:
                raise UserError(f"--start {start[0]}: its training data are unknown; give --data")
            refuse_elsewhere(settings, ["data"] if captions else ["data", "captions"], start[0])
            data = settings["data"]
            captions = captions or tuple(map(Path, caption_paths(settings.get("captions"))))
            encoding = encoding or settings.get("encoding")
        features = settings.get("features")
        if features is None or is_elsewhere(features):
            features = str(default_cache_path(data))
        torch_device = choose_device(device, world.local_rank)
        joint_options = JointOptions(
            start=start,
            data=data,
            captions=tuple(map(str, captions)),
            encoding=encoding,
            features=features,
            **chosen,
        )
        precision = choose_training_precision(joint_options.precision, torch_device)
        joint_options = replace(joint_options, precision=precision)
        callbacks = make_callbacks(run, tensorboard)
        with locked(run, world):
            progress, unreadable = finetune_joint(
                joint_options,
                run,
                torch_device,
                workers or default_workers(torch_device),
                force,
                callbacks,
                world,
            )
            if world.rank == 0:
                finish_run(run, progress, torch_device)
                for path, reason in unreadable.items():
                    echo_failure(path, reason)
            world.barrier()
    if unreadable and world.rank == 0:
        sys.exit(1)
