"""Stage 2: train the Show-and-Tell LSTM on cached features.

The manual is in train_decoder.py, the advice in its --help.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import options
from pipeline.datasets.tokenizers import ENGLISH
from pipeline.datasets.vocabulary import TOKENIZERS
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.training.decoder_stage import DecoderOptions

GROUPS = {
    "Length and speed": ("epochs", "batch_size", "lr", "patience", "seed"),
    "The decoder": ("embed_size", "hidden_size", "init_state_from_image", "tie_embeddings"),
    "Against learning by heart": (
        *("dropout", "feature_dropout", "label_smoothing", "weight_decay", "ema_decay"),
    ),
    "Words": ("min_count", "tokenizer"),
    "Learning from its own captions": (
        *("self_critical_epochs", "self_critical_lr", "self_critical_truth"),
    ),
    "Machine": ("device", "precision", "feature_memory"),
}


@options.command(GROUPS, resumable=True)
@click.option(
    "--data",
    type=options.DataPath(),
    default="data/flickr8k",
    help="Folder with the captions, and the images that the features were made of; or tar "
    "shards, as for extract_features.py.",
)
@options.captions
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    default=None,
    help="Feature cache of extract_features.py.  [default: data/features/NAME-OF-DATA.h5]",
    show_default=False,
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    default="runs/decoder",
    help="Run folder to write or go on with.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=50,
    help="Passes over the captions. The learning rate falls to zero over all of them, so more "
    "epochs is also a slower fall.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, help="Captions a batch.")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, help="Highest learning rate."
)
@options.weight_decay
@options.label_smoothing
@click.option(
    "--embed-size",
    type=click.IntRange(min=1),
    default=256,
    help="Width of the image and word embeddings.",
)
@click.option("--hidden-size", type=click.IntRange(min=1), default=512, help="Width of the LSTM.")
@click.option(
    "--dropout",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.5,
    help="Dropout on the LSTM's inputs and outputs. Raise it when val loss climbs early.",
)
@click.option(
    "--feature-dropout",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.0,
    help="Dropout on the image's 2048 numbers. 0.25 keeps val loss lower for longer; the best "
    "epoch's captions are better without.",
)
@click.option(
    "--init-state-from-image/--no-init-state-from-image",
    default=True,
    help="Let the image give the LSTM's first state, besides being its first input.",
)
@click.option(
    "--tie-embeddings/--no-tied",
    default=True,
    help="Tell words by the vectors that they are read by: fewer weights, a quicker step.",
)
@options.ema_decay(0.998)
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    default=5,
    help="Words seen less often in the training captions become <unk>.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(list(TOKENIZERS)),
    default=ENGLISH,
    help="How captions are split: english; words, for other languages that put spaces between "
    "words; characters, for Chinese, Japanese and others that do not.",
)
@click.option(
    "--self-critical-epochs",
    type=click.IntRange(min=0),
    default=0,
    help="So many of the last epochs learn from captions that the decoder draws itself, by their "
    "CIDEr-D (arXiv 1612.00563). An epoch takes about twice as long; a single one gained nothing "
    "sure on Flickr8k.",
)
@click.option(
    "--self-critical-lr",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    help="Highest learning rate of those epochs.",
)
@click.option(
    "--self-critical-truth",
    type=click.FloatRange(min=0),
    default=0.05,
    help="Weight of people's captions in those epochs, which keeps the language sound; 0: none.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of weights, order and dropout."
)
@options.patience
@options.device
@options.training_precision
@click.option(
    "--feature-memory",
    type=click.FloatRange(min=0),
    default=2.0,
    help="GB that features may take in memory (a million images: 4.1 GB); larger caches are "
    "read from the file batch by batch.",
)
@options.tensorboard
@click.option(
    "--check",
    is_flag=True,
    help="Train nothing: read all, and tell what was found, what is doubtful and how long training "
    "will take. Ends with 0 if it can start, 1 if features have to be extracted first, 2 if it "
    "cannot.",
)
@options.force
def main(
    data: str,
    captions: Path | None,
    features: Path | None,
    run: Path,
    device: str,
    precision: str,
    feature_memory: float,
    tensorboard: bool,
    tokenizer: str,
    check: bool,
    force: bool,
    **numbers: float,
) -> None:
    """Train the LSTM decoder on cached features and score it on val after every epoch.

    \b
    Examples:
      python train_decoder.py --epochs 50
      python train_decoder.py --data photos --check
      python train_decoder.py --data photos --run runs/photos --min-count 2

    At the end a matcher of images and captions is trained, in a minute or two, which helps to
    choose among captions. RUN/report.html shows curves and captions, while the training goes on
    too. Stopped at any moment, the same command goes on after the last finished epoch. Captions
    come from Flickr8k (either layout), Karpathy's or COCO's JSON, CSV, JSON Lines, or a .txt beside
    each image; data without a split is split by a hash of the image names. docs/own-data.md
    shows the whole way with your own images.

    For several GPUs or machines start it with torchrun: each process takes a share of every batch,
    and all end with the run of one (docs/scale.md).
    """
    from pipeline.cli.final_scores import score_best
    from pipeline.features.cache import default_cache_path
    from pipeline.reports.tensorboard import check_tensorboard, tensorboard_writer
    from pipeline.reports.training_report import epoch_reporter
    from pipeline.training.decoder_stage import DecoderOptions, train_decoder
    from pipeline.utils.devices import choose_decoder_precision, choose_device
    from pipeline.utils.distributed import joined_world
    from pipeline.utils.files import locked

    ended = 0
    with joined_world() as world:
        if numbers["self_critical_epochs"] >= numbers["epochs"]:
            raise UserError(
                f"--self-critical-epochs {numbers['self_critical_epochs']:.0f}: must be fewer than "
                f"--epochs {numbers['epochs']:.0f}, as the first epochs learn people's captions"
            )
        callbacks = [epoch_reporter(run)]
        if tensorboard:
            check_tensorboard()
            callbacks.append(tensorboard_writer(run))
        chosen = choose_device(device, world.local_rank)
        decoder_options = DecoderOptions(
            data=data,
            captions=str(captions) if captions else None,
            features=str(features or default_cache_path(data)),
            precision=choose_decoder_precision(precision, chosen),
            tokenizer=tokenizer,
            **numbers,  # type: ignore[arg-type]
        )
        memory = feature_memory * 1e9
        if check:
            ended = world.broadcast(lambda: _check(decoder_options, run, chosen, memory, force))
        else:
            with locked(run, world):
                progress = train_decoder(
                    decoder_options, run, chosen, memory, force, callbacks, world
                )
                if world.rank == 0:
                    score_best(run, progress, chosen)
                world.barrier()
    if ended and world.rank == 0:
        sys.exit(ended)


def _check(
    decoder_options: DecoderOptions, run: Path, device: torch.device, memory: float, force: bool
) -> int:
    """Check the data; gives the exit code."""
    from pipeline.reports.data_check import NextCommands, check_data

    own = {p.name: p.opts[0] for p in click.get_current_context().command.params if p.name}
    commands = NextCommands(
        train=options.render_command("train", {k: v for k, v in own.items() if k != "check"}),
        extract=options.render_command(
            "extract", {"data": "--data", "features": "--output", "device": "--device"}
        ),
        finetune=options.render_command(
            "finetune",
            {"data": "--data", "captions": "--captions", "device": "--device"},
            ["--start", "pretrained", "--run", f"{run}-joint"],
        ),
    )
    return check_data(decoder_options, run, device, memory, force, commands)
