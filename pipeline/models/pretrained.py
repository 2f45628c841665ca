"""The captioner in the box: a model that comes with the program.

    captioner compress runs/seed-0 runs/seed-1 runs/seed-2     # how such a file is made

It is a checkpoint like any other, with the encoder inside, but at a third of the size: the
encoder's filters have 8 bits a weight (see ``quantisation``), the decoder's weights 16.
MODEL_CARD.md in data/pretrained tells how it was trained.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.utils.errors import UserError

# What --weights and --model call it.
PRETRAINED = "pretrained"
FILE = "captioner.pt"


def pretrained_path() -> Path:
    """Find the model's file: in data/pretrained of the repository, or in the installed package.

    Raises:
        UserError: it is not there.
    """
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "data" / "pretrained", package / "pretrained_model")
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    raise UserError(f"{folders[0] / FILE}: the model that comes with the program is missing")


def is_pretrained(model: Path) -> bool:
    """Tell whether a model's name means the one that comes with the program."""
    return str(model) == PRETRAINED and not model.is_file() and not (model / "best.pt").is_file()
