"""The report of a training run: ``report.html``, one page that loads nothing else.

Training writes it between epochs and, with the worst and best captions, at its end; ``captioner
report`` rewrites it. Everything comes from the run folder and, if available, from the data set's
captions and images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from pipeline.datasets.images import ImageError
from pipeline.datasets.tar_shards import refuse_elsewhere
from pipeline.decoding.options import describe_search
from pipeline.evaluation import EvaluationOptions, evaluate_runs
from pipeline.metrics.coco import Scorer
from pipeline.models.checkpoint import load_checkpoint
from pipeline.outputs.gallery import data_uri, make_thumbnail, relative_url
from pipeline.reports.curves import best_record, read_svg, write_curves
from pipeline.reports.report_data import ReportData, read_data
from pipeline.reports.score_table import print_table
from pipeline.reports.tensorboard import tensorboard_writer
from pipeline.training.loop import Progress
from pipeline.training.options import DecoderOptions, JointOptions
from pipeline.training.run_folder import (
    CONFIG,
    LOG,
    PREDICTIONS,
    REPORT,
    SAMPLES,
    SCORES,
    SESSIONS,
    read_epochs,
)
from pipeline.training.stage import EpochCallback
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.html import environment, read_asset
from pipeline.utils.terminal import echo

if TYPE_CHECKING:
    import torch

THUMBNAIL = 224  # pixels, the longer side
EXTREMES = 8  # number of worst and of best predictions shown
COLUMNS = "CIDEr-D BLEU-4 METEOR SPICE ROUGE-L BLEU-1 BLEU-2 BLEU-3 distinct".split()
# Curves and report may take this fraction of the time since they were last written.
SHARE = 0.01


class Setting(NamedTuple):
    """An option of the run; ``default`` is empty where the value is the default."""

    name: str
    value: str
    default: str


class Shown(NamedTuple):
    """An image: its name, its thumbnail as a data URI or empty, and its references."""

    name: str
    thumbnail: str
    references: Sequence[str]


def make_callbacks(run: Path, tensorboard: bool) -> list[EpochCallback]:
    """Return the callbacks that a training command passes to the loop."""
    return [epoch_reporter(run), *([tensorboard_writer(run)] if tensorboard else [])]


def finish_run(run: Path, progress: Progress, device: torch.device) -> None:
    """Score the best epoch of a finished run with all defaults, and write its report."""
    best = f"epoch {progress.best_epoch}, CIDEr-D {progress.best_cider:.1f}"
    echo(f"best: {best} (val, beam 3)", err=True)
    if progress.best_epoch == 0:
        echo("no epoch is better than the start: the model is the start, unchanged", err=True)
    settings = _read_json(run / CONFIG) or {}
    # Given by the user to the training, not read from a file: see ``refuse_elsewhere``.
    options = EvaluationOptions(
        data=settings.get("data"),
        captions=settings.get("captions"),
        encoding=settings.get("encoding"),
        features=Path(settings["features"]) if "features" in settings else None,
        java=False,
    )
    print_table({str(run): evaluate_runs([run], device, options)})
    write_report(run, settings.get("data"))


def write_report(run: Path, data: str | Path | None = None) -> None:
    """Write curves and ``report.html`` of a run; ``data`` is the data's new location if moved.

    If the data cannot be read, the report omits what depends on them, and a message says so.

    Raises:
        UserError: the folder holds no run.
    """
    settings = _read_json(run / CONFIG)
    if settings is None or not read_epochs(run / LOG):
        raise UserError(f"{run}: no run of train_decoder.py or finetune_joint.py with an epoch")
    described, missing = None, ""
    try:
        if data is None:
            refuse_elsewhere(settings, ("data", "captions", "features"), run)
        described = read_data(settings, data, load_checkpoint(run).vocabulary)
    except UserError as error:
        missing = str(error)
        echo(f"{run / REPORT}: without images and references ({error})", err=True)
    write_curves(run)
    _write_page(run, described, missing)
    echo(f"report: {run / REPORT}", err=True)


def epoch_reporter(run: Path) -> EpochCallback:
    """Return a callback that writes curves and report as often as ``SHARE`` allows.

    The data set's captions are read once, at the first epoch.
    """
    due = 0.0
    data: ReportData | None = None

    def write(record: Mapping[str, float], samples: Mapping[str, str]) -> None:
        nonlocal due, data
        began = time.monotonic()
        if began < due:
            return
        with contextlib.suppress(UserError):  # the captions are gone
            data = data or read_data(
                _read_json(run / CONFIG), None, load_checkpoint(run).vocabulary
            )
        write_curves(run)
        _write_page(run, data, running=True)
        ended = time.monotonic()
        due = ended + (ended - began) / SHARE

    return write


def _write_page(
    run: Path, data: ReportData | None, missing: str = "", running: bool = False
) -> None:
    """Render the page; ``missing`` says why ``data`` is None. If ``running``, the page reloads."""
    settings = _read_json(run / CONFIG)
    log = read_epochs(run / LOG)
    best = best_record(log)
    evaluations = _evaluations(run)
    scores = next((each for each in evaluations if each["file"] == SCORES), None)
    rows = _score_rows(log, best, evaluations)
    scored = _scored_predictions(_read_json(run / PREDICTIONS) or [], data)
    shown = min(EXTREMES, len(scored) // 2)
    page = environment().get_template("report.html").render(
        style=Markup(read_asset("base.css", "report.css")),
        run=run.name or str(run),
        joint=_is_joint(settings),
        settings=describe_settings(settings),
        options=settings,
        log=log,
        best=best,
        final=rows[-len(evaluations)] if scores else None,
        running=running,
        sessions=read_epochs(run / SESSIONS),
        curves=Markup(read_svg(run)),
        rows=rows,
        columns=[name for name in COLUMNS if any(name in row["scores"] for row in rows)],
        evolutions=_evolutions(read_epochs(run / SAMPLES), data),
        predictions=[
            (title, [(_shown(name, data), caption, cider) for cider, name, caption in part])
            for title, part in (("Worst", scored[:shown]), ("Best", scored[::-1][:shown]))
        ] if shown else [],
        scored=len(scored),
        data=data,
        missing=missing,
        length=scores["scores"].get("mean_length") if scores else None,
        times=_times(log),
    )  # fmt: skip
    with atomic_write(run / REPORT, "wb") as handle:
        # Paths may contain bytes that are not UTF-8.
        handle.write(page.encode("utf-8", "replace"))


def _read_json(path: Path) -> Any:
    """Read a file of the run; return None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_joint(settings: Mapping[str, Any]) -> bool:
    return "unfreeze_from" in settings


def describe_settings(settings: Mapping[str, Any]) -> list[Setting]:
    """Compare each option of a run with its default; those that differ come first."""
    found = []
    for field in dataclasses.fields(JointOptions if _is_joint(settings) else DecoderOptions):
        if field.name not in settings:
            continue
        value, default = _in_words(settings[field.name]), _in_words(field.default)
        # Paths have no default here, and "auto" is saved as the value chosen for it.
        same = value == default or default in ("", "auto")
        found.append(Setting(f"--{field.name.replace('_', '-')}", value, "" if same else default))
    return sorted(found, key=lambda setting: not setting.default)


def _in_words(value: Any) -> str:
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the scores files of a run with their names, the run's own first."""
    files = sorted(run.glob("scores*.json"), key=lambda path: (path.name != SCORES, path.name))
    found = ((path.name, _read_json(path)) for path in files)
    return [{**each, "file": name, "run": run} for name, each in found if isinstance(each, dict)]


def _score_rows(
    log: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the score table: start, best and last epoch during training, then evaluations."""
    roles = {"before training": 0, "best": best["epoch"], "last": log[-1]["epoch"]}
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] = {"intervals": {}, "page": None}
    for record in log:
        words = [role for role, epoch in roles.items() if epoch == record["epoch"]]
        if words:
            name = f"epoch {record['epoch']}, {', '.join(words)}"
            search = "val, during training, beam 3"
            rows.append({**row, "name": name, "search": search, "scores": record})
    for each in evaluations:
        own = each["file"] == SCORES
        page = Path(each.get("page") or "")
        rows.append(
            {
                "name": f"best checkpoint, epoch {each['epoch']}" if own else each["file"],
                "search": f"{each['split']}, {describe_search(each['search'])}",
                "scores": {**each["scores"], "distinct": each["scores"]["distinct_captions"]},
                "intervals": each.get("intervals_95_percent", {}),
                "page": relative_url(page, each["run"] / REPORT) if page.is_file() else None,
            }
        )
    return rows


def _evolutions(
    samples: Sequence[Mapping[str, Any]], data: ReportData | None
) -> list[tuple[Shown, list[tuple[str, list[int]]]]]:
    """Return each sample image with its captions and the consecutive epochs that gave each."""
    evolutions = []
    for name in samples[-1]["captions"] if samples else ():
        pairs = [(line["captions"][name], line["epoch"]) for line in samples]
        stretches = [
            (caption, [epoch for _, epoch in group])
            for caption, group in itertools.groupby(pairs, key=lambda pair: pair[0])
        ]
        evolutions.append((_shown(name, data), stretches))
    return evolutions


def _scored_predictions(
    predictions: Sequence[Mapping[str, str]], data: ReportData | None
) -> list[tuple[float, str, str]]:
    """Return CIDEr-D, name and caption of each prediction of val, the lowest first."""
    if data is None:
        return []
    names = data.names
    captions = {names[p["image_id"]]: p["caption"] for p in predictions if p["image_id"] in names}
    if not captions:
        return []
    scorer = Scorer({name: data.val[name] for name in captions})
    found = scorer.per_image_cider(
        {name: data.vocabulary.tokenize(text) for name, text in captions.items()}
    )
    return sorted((cider, name, captions[name]) for name, cider in found.items())


def _shown(name: str, data: ReportData | None) -> Shown:
    if data is None:
        return Shown(name, "", ())
    try:
        thumbnail = data_uri(make_thumbnail(data.images[name], THUMBNAIL))
    except (LookupError, ImageError):
        thumbnail = ""
    return Shown(name, thumbnail, data.references.get(name, ()))


def _times(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return times in seconds: training and validation in total, and statistics per epoch."""
    trained = [record for record in log if "seconds" in record]
    epochs = [record["seconds"] + record["validation_seconds"] for record in trained] or [0.0]
    return {
        "training": sum(record["seconds"] for record in trained),
        "validation": sum(record["validation_seconds"] for record in log),
        "median": statistics.median(epochs),
        "fastest": min(epochs),
        "slowest": max(epochs),
    }
