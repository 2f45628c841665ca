"""Stage 2: train the Show-and-Tell LSTM on cached features."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.training.options import MACHINE, TRAINING, DecoderOptions
from pipeline.utils.errors import UserError


@options.command({TRAINING: (), MACHINE: ("feature_memory", "tensorboard")}, resumable=True)
@click.option(
    "--data",
    type=options.DataPath(),
    default="data/flickr8k",
    help="Folder with the captions, and with the images that the features come from; or tar "
    "shards, as for extract_features.py.",
)
@options.captions
@options.encoding
@options.path(
    "--features",
    "Feature cache of extract_features.py.  [default: data/features/NAME-OF-DATA.h5]",
)
@options.path("--run", "Run folder to write, or to resume.", default="runs/decoder")
@options.from_dataclass(DecoderOptions)
@options.device
@click.option(
    "--feature-memory",
    type=click.FloatRange(min=0),
    default=2.0,
    help="GB of memory for features (a million images need 4.1 GB); larger caches are read from "
    "the file batch by batch.",
)
@options.tensorboard
@click.option(
    "--check",
    is_flag=True,
    help="Do not train: read all inputs, report what was found and what is doubtful, and print "
    "the commands to run next. Exit code 0 if training can start, 1 if features have to be "
    "extracted first, 2 if it cannot start.",
)
@options.force
def main(
    captions: tuple[Path, ...],
    features: Path | None,
    run: Path,
    device: str,
    feature_memory: float,
    tensorboard: bool,
    check: bool,
    force: bool,
    **chosen: Any,
) -> None:
    """Train the LSTM decoder on cached features and score it on val after every epoch.

    \b
    Examples:
      python train_decoder.py --epochs 50
      python train_decoder.py --data photos --check
      python train_decoder.py --data photos --run runs/photos --min-count 2

    At the end an image-text matcher is trained for reranking, which takes a minute or two.
    RUN/report.html shows curves and captions, also while the training runs. If it is stopped, the
    same command resumes it after the last finished epoch. Captions come from Flickr8k (either
    layout), Karpathy's or COCO's JSON, CSV, JSON, Hugging Face's imagefolder, or a text file beside
    each image (docs/file-formats.md lists them); data without a split are split by folders of that
    name, else by a hash of the image names. docs/own-data.md explains every step with your own
    images.

    For several GPUs or machines, start it with torchrun: each process takes a share of every batch,
    and the result is that of one process (docs/scale.md).
    """
    from pipeline.features.cache import default_cache_path
    from pipeline.reports.training_report import finish_run, make_callbacks
    from pipeline.training.decoder_stage import train_decoder
    from pipeline.utils.devices import choose_decoder_precision, choose_device
    from pipeline.utils.distributed import joined_world
    from pipeline.utils.files import locked

    decoder_options = DecoderOptions(
        captions=tuple(map(str, captions)),
        features=str(features or default_cache_path(chosen["data"])),
        **chosen,
    )
    if not decoder_options.self_critical_epochs:
        unused = ["self_critical_lr", "cross_entropy_weight"]
        options.refuse_given(unused, "is for --self-critical-epochs")
    code = 0
    with joined_world() as world:
        force = force and not world.restarted
        if decoder_options.self_critical_epochs >= decoder_options.epochs:
            raise UserError(
                f"--self-critical-epochs {decoder_options.self_critical_epochs}: must be fewer "
                f"than --epochs {decoder_options.epochs}, as the first epochs train on the "
                "captions of the data"
            )
        torch_device = choose_device(device, world.local_rank)
        precision = choose_decoder_precision(decoder_options.precision, torch_device)
        decoder_options = replace(decoder_options, precision=precision)
        callbacks = make_callbacks(run, tensorboard)
        if check:
            code = world.broadcast(lambda: _check(decoder_options, run, force))
        else:
            with locked(run, world):
                progress = train_decoder(
                    decoder_options,
                    run,
                    torch_device,
                    feature_memory * 1e9,
                    force,
                    callbacks,
                    world,
                )
                if world.rank == 0:
                    finish_run(run, progress, torch_device)
                world.barrier()
    if code and world.rank == 0:
        sys.exit(code)


def _check(decoder_options: DecoderOptions, run: Path, force: bool) -> int:
    """Check the data; return the exit code."""
    from pipeline.reports.data_check import NextCommands, check_data

    own = {p.name: p.opts[0] for p in click.get_current_context().command.params if p.name}
    del own["check"]
    extract = {"data": "--data", "features": "--output", "device": "--device"}
    finetune = {name: own[name] for name in ("data", "captions", "encoding", "device")}
    more = ["--start", "pretrained", "--run", f"{run}-joint"]
    commands = NextCommands(
        train=shlex.join(options.render_command("train", own)),
        extract=shlex.join(options.render_command("extract", extract)),
        finetune=shlex.join(options.render_command("finetune", finetune) + more),
    )
    return check_data(decoder_options, run, force, commands)
