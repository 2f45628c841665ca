"""The captioner in the box: a model that comes with the program.

    python -m pipeline.pretrained runs/seed-0 runs/seed-1 runs/seed-2     # how such a file is made

It is a checkpoint like any other, with the encoder inside, but at a third of the size: the
encoder's filters have 8 bits a weight (see ``quantisation``), the decoder's weights 16.
MODEL_CARD.md in data/pretrained tells how it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline import options
from pipeline.errors import UserError
from pipeline.terminal import say

# What --weights and --model call it.
PRETRAINED = "pretrained"
FILE = "captioner.pt"


def pretrained_path() -> Path:
    """Find the model's file: in data/pretrained of the repository, or in the installed package.

    Raises:
        UserError: it is not there.
    """
    package = Path(__file__).resolve().parent
    folders = (package.parent / "data" / "pretrained", package / "pretrained_model")
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    raise UserError(f"{folders[0] / FILE}: the model that comes with the program is missing")


def is_pretrained(model: Path) -> bool:
    """Tell whether a model's name means the one that comes with the program."""
    return str(model) == PRETRAINED and not model.is_file() and not (model / "best.pt").is_file()


def save_compressed(runs: Sequence[Path], target: Path, weights: str | None = None) -> None:
    """Write one small file that captions by itself, of a run or of several together.

    Args:
        runs: run folders or checkpoints, see ``checkpoint.load_together``.
        target: the file to write.
        weights: the encoder's weights, where a run of stage 2 no longer finds them.

    Raises:
        UserError: no such checkpoints, or not of one encoder; its weights cannot be had.
    """
    import torch

    from pipeline.captioner import encoder_of
    from pipeline.checkpoint import checkpoint_content, load_together, write_content
    from pipeline.encoder import Encoder, load_trunk
    from pipeline.quantisation import cast, dequantise, quantise

    checkpoint = load_together(runs)
    whole = encoder_of(checkpoint, weights, "fp32").trunk.state_dict()
    rounded, scales = quantise({name: tensor.contiguous() for name, tensor in whole.items()})
    # The rounded encoder is another one: features of the two must not be mixed.
    encoder = Encoder()
    load_trunk(encoder, dequantise(rounded, scales), PRETRAINED)
    checkpoint.encoder = encoder.identity
    checkpoint.training = None
    # Where the files were in training tells others nothing.
    elsewhere: dict[str, Any] = {
        "data": "data/flickr8k",
        "features": "data/features/flickr8k.h5",
        "captions": None,
        "weights": None,
        "start": [],
    }
    checkpoint.settings |= {k: v for k, v in elsewhere.items() if k in checkpoint.settings}
    content = checkpoint_content(checkpoint)
    content["encoder_weights"], content["encoder_scales"] = rounded, scales
    content["decoder_weights"] = cast(checkpoint.decoder_weights, torch.float16)
    if content["matcher"] is not None:
        content["matcher"]["weights"] = cast(content["matcher"]["weights"], torch.float16)
    write_content(target, content)


@options.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.weights
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("data/pretrained") / FILE,
    help="File to write.",
)
def main(runs: tuple[Path, ...], weights: str | None, output: Path) -> None:
    """Make one small file that captions by itself of RUNS: encoder, decoders and all.

    RUNS are run folders or checkpoints of stage 2 or 3. Of several, which must be of one encoder
    and recipe, the decoders caption together.
    """
    save_compressed(runs, output, weights)
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB", err=True)


if __name__ == "__main__":
    main()
