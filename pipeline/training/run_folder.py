"""The folder of a training run; docs/file-formats.md describes its files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.datasets.caption_table import CaptionTable
from pipeline.features.cache import FeatureCache
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.pretrained import BEST, CONFIG, LAST
from pipeline.training.options import DecoderOptions, JointOptions
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write

RESUME = "resume.safetensors"
LOG = "log.jsonl"
SAMPLES = "samples.jsonl"
SESSIONS = "sessions.jsonl"
CURVES = "curves.svg"
CURVES_PNG = "curves.png"
REPORT = "report.html"
PREDICTIONS = "predictions.json"
SCORES = "scores.json"
RESULTS = (CURVES, CURVES_PNG, REPORT, PREDICTIONS, SCORES)
RUN_FILES = (BEST, LAST, RESUME, LOG, SAMPLES, SESSIONS, *RESULTS, CONFIG)
TENSORBOARD = "tensorboard"  # a folder
# These may change when a run is resumed, as data may move; the hashes of the splits may not.
PATH_OPTIONS = {"data", "captions", "encoding", "features", "weights"}


def split_hashes(table: CaptionTable) -> dict[str, str]:
    """Return the settings that identify the training data: hashes of the splits' image lists."""
    return {f"{split}_images": table.split_hash(split) for split in ("train", "val")}


def can_resume(run: Path, force: bool) -> bool:
    """True if the folder holds a run, unless ``force`` starts it over."""
    return (run / RESUME).is_file() and not force


def open_run(
    run: Path, settings: dict[str, Any], force: bool, world: World = SINGLE_PROCESS
) -> None:
    """Create the run folder and its ``config.json``, or check that it holds the same run.

    Call it after all inputs are checked, as ``force`` deletes what is there. All processes must
    have the same settings; only rank 0 touches the folder.

    Raises:
        UserError: the folder holds a run with other settings, and ``force`` is not set; or another
            program's ``config.json``; or the processes' settings differ.
    """
    world.refuse_differences(settings)
    if world.rank > 0:
        return
    _refuse_foreign_config(run)
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


def _refuse_foreign_config(run: Path) -> None:
    """Raise UserError if ``config.json`` is another program's; many models come with one."""
    path = run / CONFIG
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(saved, dict) and "epochs" not in saved:
            raise UserError(f"{path}: is not of a training run; choose another --run")


def refuse_other_settings(run: Path, settings: dict[str, Any]) -> None:
    """Check that a run in the folder, if there is one, has the same settings.

    An option missing from its ``config.json`` is assumed to have its default.

    Raises:
        UserError: its settings differ, or its ``config.json`` is damaged.
    """
    path = run / CONFIG
    if not path.is_file() or not can_resume(run, False):
        return
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); --force starts over") from error
    settings = json.loads(json.dumps(settings))  # tuples as lists
    options_class = JointOptions if "unfreeze_from" in settings else DecoderOptions
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(options_class)
        if field.default is not dataclasses.MISSING
    }
    for name in sorted(settings.keys() - PATH_OPTIONS):
        before, now = saved.get(name, defaults.get(name)), settings[name]
        same = before == now
        if name == "start" and before:
            same = [Path(path).resolve() for path in before] == [Path(p).resolve() for p in now]
        if not same:
            before, now = ("the default" if v is None else v for v in (before, now))
            raise UserError(
                f"{run} was started with {name} {before}, not {now}: resume with that value, "
                "choose another --run, or restart with --force"
            )


def refuse_other_features(run: Path, saved: Checkpoint, cache: FeatureCache) -> None:
    """Raise UserError if the features are not those that the run started with."""
    mismatch = saved.encoder.mismatch(cache.identity)
    if mismatch:
        raise UserError(f"{cache.path}: not the features that {run} started with ({mismatch})")


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per epoch; return an empty list if it is missing.

    Raises:
        UserError: the file cannot be read, or has another format.
    """
    try:
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.split("\n") if line]
        return [record for record in records if int(record["epoch"]) >= 0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: not a file of one JSON object per epoch") from error


def record_session(run: Path, epoch: int, device: torch.device) -> None:
    """Record a start or resumption after ``epoch``: command, time, device and versions."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device}, {platform.machine()}"
    session = {
        "epoch": epoch,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": name,
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }
    append_epoch(run / SESSIONS, session)


def trim_epochs(path: Path, epoch: int) -> None:
    """Drop the lines of epochs after ``epoch``, which were written but never saved."""
    if path.is_file():
        _write(path, [record for record in read_epochs(path) if record["epoch"] <= epoch])


def append_epoch(path: Path, record: dict[str, Any]) -> None:
    """Append an epoch's line, completely or not at all."""
    _write(path, [*read_epochs(path), record])


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_write(path) as handle:
        handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
