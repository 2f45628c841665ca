"""The end of a training: what its best epoch scores, on the terminal and in the run folder."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.evaluation import evaluate_runs, print_table
from pipeline.reports.training_report import write_report
from pipeline.training.loop import Progress
from pipeline.utils.terminal import echo


def score_best(run: Path, progress: Progress, device: torch.device) -> None:
    """Say which epoch was the best, score it on val as it will caption, and finish the report."""
    echo(
        f"best: epoch {progress.best_epoch}, CIDEr-D {progress.best_cider:.1f} (val, beam 3)",
        err=True,
    )
    print_table({str(run): evaluate_runs([run], device, java=False)})
    write_report(run)
