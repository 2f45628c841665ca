"""Stage 3, optional: train encoder and decoder together, on the images themselves.

The manual is in finetune_joint.py, the advice in its --help.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.cli import options
from pipeline.utils.terminal import echo_failure

GROUPS = {
    "What learns, and how fast": (
        *("epochs", "batch_size", "grad_accum_steps", "encoder_lr", "decoder_lr", "weight_decay"),
        *("label_smoothing", "ema_decay", "unfreeze_from", "patience", "seed"),
    ),
    "How images are varied": ("min_crop", "flip"),
    "Machine": ("device", "precision", "workers"),
}


@options.command(GROUPS, resumable=True)
@click.option(
    "--start",
    type=click.Path(path_type=Path),
    multiple=True,
    default=["runs/decoder"],
    help="The run to start from: a folder of train_decoder.py, a checkpoint, or 'pretrained', the "
    "model that comes with the program. Given several times, for runs of one recipe with other "
    "seeds, all their decoders are trained on one encoder and caption together.",
)
@click.option(
    "--data",
    type=options.DataPath(),
    default=None,
    help="Folder, or tar shards, with images and captions.  [default: that of the starting run]",
    show_default=False,
)
@options.captions
@options.weights
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    default="runs/joint",
    help="Run folder to write or go on with.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=12, help="Passes over the images.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    help="Images a batch, each with all its captions.",
)
@click.option(
    "--grad-accum-steps",
    type=click.IntRange(min=1),
    default=4,
    help="Batches a step. Fewer and larger batches give the same steps: on a GPU --batch-size 64 "
    "--grad-accum-steps 1 is quicker.",
)
@click.option(
    "--encoder-lr",
    type=click.FloatRange(min=0),
    default=3e-4,
    help="Highest learning rate of the encoder.",
)
@click.option(
    "--decoder-lr",
    type=click.FloatRange(min=0),
    default=3e-4,
    help="Highest learning rate of the decoder, which is trained already.",
)
@options.weight_decay
@options.label_smoothing
@options.ema_decay(0.995)
@click.option(
    "--unfreeze-from",
    default="Mixed_6a",
    help="First InceptionV3 block that learns. Later ones (Mixed_7a) gain less, and spare time "
    "and memory: on a CPU 30 % of the time.",
)
@click.option(
    "--min-crop",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.7,
    help="Least share of each side that a random crop keeps; 1 turns cropping off.",
)
@click.option(
    "--flip/--no-flip",
    default=True,
    help="Mirror half of the images, except those whose captions say left or right; with another "
    "--tokenizer than english in stage 2, none.",
)
@options.patience
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    help="Of order, augmentation and dropout.",
)
@options.device
@options.training_precision
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Threads that decode images.  [default: one a core, at most 8]",
    show_default=False,
)
@options.tensorboard
@options.force
def main(
    start: tuple[Path, ...],
    data: str | None,
    captions: Path | None,
    weights: str | None,
    run: Path,
    device: str,
    precision: str,
    workers: int | None,
    tensorboard: bool,
    force: bool,
    **options: float,
) -> None:
    """Fine-tune encoder and decoder together, end to end, on images.

    \b
    Examples:
      python finetune_joint.py
      python finetune_joint.py --start pretrained --data photos --run runs/photos
      python finetune_joint.py --start runs/seed-0 --start runs/seed-1 --run runs/joint-2
      python finetune_joint.py --unfreeze-from Mixed_7a --epochs 4 --run runs/joint-7a

    BatchNorm's statistics stay as they are. RUN/report.html shows curves and captions, while the
    training goes on too. Stopped at any moment, the same command goes on after the last finished
    epoch.

    For several GPUs or machines start it with torchrun: each process reads its share of every
    batch's images, and all end with the run of one (docs/scale.md).
    """
    from pipeline.cli.final_scores import score_best
    from pipeline.models.checkpoint import load_checkpoint
    from pipeline.reports.tensorboard import check_tensorboard, tensorboard_writer
    from pipeline.reports.training_report import epoch_reporter
    from pipeline.training.finetune import finetune_joint
    from pipeline.training.joint_stage import JointOptions
    from pipeline.utils.devices import choose_device, choose_training_precision, default_workers
    from pipeline.utils.distributed import joined_world
    from pipeline.utils.errors import UserError
    from pipeline.utils.files import locked

    callbacks = [epoch_reporter(run)]
    with joined_world() as world:
        settings = load_checkpoint(start[0]).settings
        if not {"data", "captions", "features"} <= settings.keys():
            raise UserError(f"--start {start[0]}: does not say what it was trained on")
        if data is None:
            data = settings["data"]
            captions = captions or (Path(settings["captions"]) if settings["captions"] else None)
        if tensorboard:
            check_tensorboard()
            callbacks.append(tensorboard_writer(run))
        chosen = choose_device(device, world.local_rank)
        joint_options = JointOptions(
            start=tuple(map(str, start)),
            data=data,
            captions=str(captions) if captions else None,
            weights=weights,
            features=settings["features"],
            precision=choose_training_precision(precision, chosen),
            **options,  # type: ignore[arg-type]
        )
        with locked(run, world):
            progress, unreadable = finetune_joint(
                *(joint_options, run, chosen, workers or default_workers(chosen), force),
                *(callbacks, world),
            )
            if world.rank == 0:
                score_best(run, progress, chosen)
                for path, reason in unreadable.items():
                    echo_failure(path, reason)
            world.barrier()
    if unreadable and world.rank == 0:
        sys.exit(1)
