"""The folder of a training run: its settings, and its files of one line an epoch.

A run folder holds

    config.json     the options of the run
    log.jsonl       one line an epoch: losses, scores, learning rate, seconds
    samples.jsonl   one line an epoch: the captions of a few val images, always the same ones
    curves.svg      what log.jsonl says, drawn
    report.html     the run at a glance: open it in a browser
    last.pt         everything needed to go on
    best.pt         the epoch with the best CIDEr-D on val: the model to use

and after the training ``predictions.json`` and ``scores.json``, those of ``best.pt``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write

CONFIG, LOG, SAMPLES, CURVES, REPORT, PREDICTIONS, SCORES = (
    "config.json",
    "log.jsonl",
    "samples.jsonl",
    "curves.svg",
    "report.html",
    "predictions.json",
    "scores.json",
)
RUN_FILES = ("last.pt", "best.pt", LOG, SAMPLES, CURVES, REPORT, CONFIG, PREDICTIONS, SCORES)
TENSORBOARD = "tensorboard"  # a folder
PATH_OPTIONS = {"data", "captions", "features", "weights"}
# What runs had that were begun before there was a choice.
EARLIER_OPTIONS = {"tokenizer": "english"}


def open_run(
    run: Path, settings: dict[str, Any], force: bool, world: World = SINGLE_PROCESS
) -> None:
    """Make the run folder and its ``config.json``, or check that the run there is the same one.

    To be called when all inputs are known to be good: ``force`` deletes the run there.
    Paths are not compared, as data may move; the hashes of the splits are. Of a job's processes,
    which must have the same settings, rank 0 alone does this.

    Raises:
        UserError: the folder holds a run with other settings, and ``force`` is not set; or the
            processes' settings differ.
    """
    world.refuse_differences(settings)
    if world.rank == 0:
        _open_run(run, settings, force)


def _open_run(run: Path, settings: dict[str, Any], force: bool) -> None:
    if force:
        for file in (run / name for name in RUN_FILES):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{file}: cannot be removed ({error.strerror})") from error
        shutil.rmtree(run / TENSORBOARD, ignore_errors=True)
    refuse_other_settings(run, settings)
    with atomic_write(run / CONFIG) as handle:
        json.dump(settings, handle, indent=2)
        handle.write("\n")


def refuse_other_settings(run: Path, settings: dict[str, Any]) -> None:
    """Check that the run in a folder, if there is one, can go on with these settings.

    Raises:
        UserError: it has others; see ``open_run``.
    """
    path = run / CONFIG
    settings = json.loads(json.dumps(settings))  # as it will be read again: tuples as lists
    if path.is_file() and (run / "last.pt").is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        before |= {k: v for k, v in EARLIER_OPTIONS.items() if k in settings and k not in before}
        for option in sorted((before.keys() | settings.keys()) - PATH_OPTIONS):
            if before.get(option) != settings.get(option):
                raise UserError(
                    f"{run} was started with {option} {before.get(option)}, not "
                    f"{settings.get(option)}: give that to go on with it, another --run for a "
                    "new one, or --force to start it over"
                )


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Read a file of one line an epoch; one that is not there has none.

    Raises:
        UserError: the file cannot be read, or is not one of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.split("\n") if line]
        return [record for record in records if int(record["epoch"]) >= 0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: not a file of one JSON object an epoch") from error


def trim_epochs(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after ``epoch``: they were written, but never saved."""
    if path.is_file():
        _write(path, [record for record in read_epochs(path) if record["epoch"] <= epoch])


def append_epoch(path: Path, record: dict[str, Any]) -> None:
    """Add the line of an epoch, whole or not at all."""
    _write(path, [*read_epochs(path), record])


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_write(path) as handle:
        handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
