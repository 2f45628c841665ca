"""TensorBoard's files of a run, an extra: ``pip install -e '.[tensorboard]'``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_folder import TENSORBOARD


def check_tensorboard() -> None:
    """Make sure that the package is there, without the time and the warnings of importing it.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: not installed; pip install -e '.[tensorboard]'")


def write_tensorboard(run: Path, record: Mapping[str, float], samples: Mapping[str, str]) -> None:
    """Add an epoch's line of the log, and its sample captions as text, one tag a picture.

    What the files have of this epoch and later ones, before a run was stopped, is purged.
    """
    from torch.utils.tensorboard import SummaryWriter

    epoch = int(record["epoch"])
    with SummaryWriter(run / TENSORBOARD, purge_step=epoch) as writer:
        for name, value in record.items():
            if name != "epoch":
                writer.add_scalar(name, value, epoch)
        for name, caption in samples.items():
            writer.add_text(f"captions/{name}", caption, epoch)
