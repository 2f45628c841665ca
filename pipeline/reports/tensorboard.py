"""TensorBoard files of a run, an optional extra: ``pip install -e '.[tensorboard]'``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.training.run_folder import TENSORBOARD
from pipeline.training.stage import EpochCallback
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard_writer(run: Path) -> EpochCallback:
    """Return a callback that adds an epoch's record, and its captions as text, one tag per image.

    Data that an earlier session of the run wrote for that epoch or later ones is purged.

    Raises:
        UserError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:  # importing it now would take seconds
        raise UserError("--tensorboard: not installed; pip install -e '.[tensorboard]'")
    writer: SummaryWriter | None = None

    def write(record: Mapping[str, float], samples: Mapping[str, str]) -> None:
        nonlocal writer
        epoch = int(record["epoch"])
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(run / TENSORBOARD, purge_step=epoch)
        for name, value in record.items():
            if name != "epoch":
                writer.add_scalar(name, value, epoch)
        for name, caption in samples.items():
            writer.add_text(f"captions/{name}", caption, epoch)
        writer.flush()

    return write
