"""Find the pretrained model, the checkpoint that ships with the program. No torch import."""

from __future__ import annotations

from pathlib import Path

from pipeline.utils.errors import UserError

# Its name for --weights and --model.
PRETRAINED = "pretrained"
FILE, CARD = "captioner.safetensors", "MODEL_CARD.md"
LICENCE = "trained on Flickr8k, for research and education only"
# In a run folder: the checkpoint to use, that of the last epoch, and the run's settings.
BEST, LAST, CONFIG = "best.safetensors", "last.safetensors", "config.json"
# The key of the JSON document in the metadata of a checkpoint.
DOCUMENT = "captioner"


def pretrained_path() -> Path:
    """Return the model's file, in the repository or the installed package, or raise UserError."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "data" / "pretrained", package / "pretrained_model")
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    raise UserError(f"{folders[0] / FILE}: the pretrained model is missing")


def checkpoint_path(model: Path) -> Path:
    """Return the file of a model: a checkpoint, a run folder, or ``pretrained``.

    Raises:
        UserError: there is none.
    """
    path = pretrained_path() if is_pretrained(model) else model
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; train one with train_decoder.py, or name 'pretrained', "
            "the model that comes with the program"
        )
    return path


def is_pretrained(model: Path) -> bool:
    """True if a name means the pretrained model, and no file or run of that name is here."""
    return str(model) == PRETRAINED and not model.is_file() and not (model / BEST).is_file()
