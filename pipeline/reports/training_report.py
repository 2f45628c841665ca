"""The report of a training run: one page, ``report.html``, that needs nothing beside it.

    captioner report runs/decoder

Training writes it after every epoch and, with the worst and best captions, at its end. All that
it shows is read from the run folder, and from the data set's captions and images, as far as
they are there.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.datasets.images import ImageError, load_image
from pipeline.datasets.tar_shards import TarMember
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.options import describe_search
from pipeline.metrics.coco import Scorer
from pipeline.models.checkpoint import load_checkpoint
from pipeline.reports.curves import best_record, draw_curves, write_curves
from pipeline.reports.report_data import ReportData, Tokenised, read_data
from pipeline.training.run_folder import (
    CONFIG,
    LOG,
    PREDICTIONS,
    REPORT,
    SAMPLES,
    SCORES,
    read_epochs,
)
from pipeline.training.stage import EpochCallback
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.terminal import echo

THUMBNAIL = 224  # pixels, the longer side
EXTREMES = 8  # predictions shown, of the worst and of the best
# A stretch of captions is folded away where there are more, but the first and last ones.
MOST_STRETCHES = 11
COLUMNS = (
    *("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
    *("METEOR", "SPICE", "ROUGE-L", "CIDEr-D", "distinct"),
)
# An epoch's report may take this share of the time since the last one.
SHARE = 0.01


@dataclass(frozen=True)
class Setting:
    """An option of the run; ``default`` is in words, and empty where the value is the default."""

    name: str
    value: str
    default: str
    help: str


@dataclass(frozen=True)
class Row:
    """A row of the score table: ``scores`` and 95 % intervals by name."""

    name: str
    search: str
    scores: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Shown:
    """An image: its name, its thumbnail as a data URI or empty, and what people say of it."""

    name: str
    thumbnail: str
    references: Sequence[str]


@dataclass(frozen=True)
class Stretch:
    """Epochs, one after the other, that have the same caption; ``best``: among them the best."""

    first: int
    last: int
    caption: str
    best: bool


@dataclass(frozen=True)
class Evolution:
    """How an image's caption changed: stretches in order, in blocks that are folded or not."""

    image: Shown
    blocks: Sequence[tuple[bool, Sequence[Stretch]]]


@dataclass(frozen=True)
class Scored:
    """A prediction with its CIDEr-D."""

    image: Shown
    caption: str
    cider: float


def write_report(run: Path, data: Path | None = None) -> None:
    """Write ``report.html`` of a run from what its folder holds.

    Without the data set, which is said aloud, the report has no images, references and facts
    of it.

    Args:
        run: the run folder.
        data: the data folder, where it moved since the training.

    Raises:
        UserError: the folder holds no run.
    """
    if not read_epochs(run / LOG) or _read_json(run / CONFIG) is None:
        raise UserError(f"{run}: no run of train_decoder.py or finetune_joint.py with an epoch")
    settings = _read_json(run / CONFIG)
    vocabulary = load_checkpoint(run).vocabulary
    try:
        described, val = read_data(settings, data, vocabulary)
    except UserError as error:
        echo(f"{run / REPORT}: without images and references ({error})", err=True)
        _write(run, None, {}, str(error))
    else:
        _write(run, described, val, "", vocabulary)
    write_curves(run)
    echo(f"report: {run / REPORT}", err=True)


def epoch_reporter(run: Path) -> EpochCallback:
    """Return a callback that writes the curves every epoch, and the report when that is cheap.

    The data set's captions are read once more, at the first epoch.
    """
    due = 0.0
    data: ReportData | None = None

    def watch(record: Mapping[str, float], samples: Mapping[str, str]) -> None:
        nonlocal due, data
        write_curves(run)
        if time.monotonic() < due:
            return
        if data is None:
            data = _read_run_data(run)
        began = time.monotonic()
        _write(run, data, {}, "")
        ended = time.monotonic()
        due = ended + (ended - began) / SHARE

    return watch


def _read_run_data(run: Path) -> ReportData | None:
    """Read the captions of a run; None, for a report without images, where they are gone."""
    try:
        return read_data(_read_json(run / CONFIG), None, load_checkpoint(run).vocabulary)[0]
    except UserError:
        return None


def _write(
    run: Path,
    data: ReportData | None,
    val: Tokenised,
    missing: str,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Fill in the page.

    ``missing`` says why there are no data; ``val`` is to score the predictions with, whose tokens
    are those of ``vocabulary``.
    """
    from markupsafe import Markup

    from pipeline.utils.html import environment

    settings = _read_json(run / CONFIG)
    log = read_epochs(run / LOG)
    best = best_record(log)
    scores = _read_json(run / SCORES)
    if scores and scores["split"] != "val":
        scores = None
    rows = _rows(log, best, scores)
    scored = _scored(_read_json(run / PREDICTIONS), val, vocabulary) if vocabulary else []
    shown = min(EXTREMES, len(scored) // 2)
    predictions = [
        (title, [Scored(_image(name, data), caption, cider) for cider, name, caption in part])
        for title, part in (("Worst", scored[:shown]), ("Best", scored[::-1][:shown]))
    ]
    page = environment().get_template("report.html").render(
        run=run.name or str(run),
        joint=_is_joint(settings),
        settings=describe_settings(settings),
        epochs=settings.get("epochs"),
        log=log,
        best=best,
        curves=Markup(draw_curves(log)),
        rows=rows,
        columns=[name for name in COLUMNS if any(name in row.scores for row in rows)],
        options=settings,
        evolutions=_evolutions(read_epochs(run / SAMPLES), best["epoch"], data),
        predictions=[(title, part) for title, part in predictions if part],
        scored=len(scored),
        data=data,
        missing=missing,
        length=scores["scores"].get("mean_length") if scores else None,
        times=_times(log),
    )  # fmt: skip
    with atomic_write(run / REPORT, "wb") as handle:
        # Paths of this machine may hold bytes that are no text.
        handle.write(page.encode("utf-8", "replace"))


def _read_json(path: Path) -> Any:
    """Read a file of the run; None where there is none, or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_joint(settings: Mapping[str, Any]) -> bool:
    return "unfreeze_from" in settings


def describe_settings(settings: Mapping[str, Any]) -> list[Setting]:
    """Set each option beside its default; those that differ come first."""
    from pipeline.cli import finetune, train

    command = finetune.main if _is_joint(settings) else train.main
    found = []
    for parameter in command.params:
        if parameter.name not in settings or not isinstance(parameter, click.Option):
            continue
        value = _in_words(settings[parameter.name])
        default = _in_words(parameter.get_default(click.Context(command)))
        # "auto" and paths that follow from others are written down as what they came to.
        same = value == default or default in ("", "auto")
        found.append(
            Setting(parameter.opts[0], value, "" if same else default, parameter.help or "")
        )
    return sorted(found, key=lambda setting: not setting.default)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _rows(
    log: Sequence[Mapping[str, Any]], best: Mapping[str, Any], scores: Mapping[str, Any] | None
) -> list[Row]:
    """Give the score table: start, best epoch and last; ``best.pt`` as it was scored."""
    roles = (("before training", 0), ("best", best["epoch"]), ("last", log[-1]["epoch"]))
    rows = []
    for record in log:
        words = [role for role, epoch in roles if epoch == record["epoch"]]
        if words:
            rows.append(Row(f"epoch {record['epoch']}, {', '.join(words)}", "beam 3", record, {}))
    if scores:
        found = dict(scores["scores"])
        found["distinct"] = found.get("distinct_captions")
        # Older files have not all of this.
        search = describe_search({"consensus": 0, "matching": 0, **scores["search"]})
        intervals = scores.get("intervals_95_percent", {})
        rows.append(Row(f"best.pt, epoch {scores['epoch']}", search, found, intervals))
    return rows


def _evolutions(
    samples: Sequence[Mapping[str, Any]], best: int, data: ReportData | None
) -> list[Evolution]:
    """Collapse the epochs in which an image's caption did not change, image by image."""
    names = list(samples[-1]["captions"]) if samples else []
    found = []
    for name in names:
        stretches: list[Stretch] = []
        pairs = [(r["epoch"], r["captions"][name]) for r in samples if name in r["captions"]]
        for caption, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
            epochs = [epoch for epoch, _ in group]
            stretches.append(Stretch(epochs[0], epochs[-1], caption, best in epochs))
        found.append(Evolution(_image(name, data), _folded(stretches)))
    return found


def _folded(stretches: Sequence[Stretch]) -> list[tuple[bool, list[Stretch]]]:
    """Fold those in the middle, except the one of the best epoch, where there are many."""
    edge = MOST_STRETCHES // 2
    many = len(stretches) > MOST_STRETCHES
    return [
        (folded, [stretch for _, stretch in group])
        for folded, group in itertools.groupby(
            enumerate(stretches),
            key=lambda pair: many and edge <= pair[0] < len(stretches) - edge and not pair[1].best,
        )
    ]


def _scored(
    predictions: Any, val: Tokenised, vocabulary: Vocabulary
) -> list[tuple[float, str, str]]:
    """Give CIDEr-D, name and caption of each prediction of val, the lowest first."""
    try:
        captions = {entry["image_id"]: str(entry["caption"]) for entry in predictions or ()}
    except (TypeError, LookupError):
        return []
    captions = {name: caption for name, caption in captions.items() if name in val}
    if not captions:
        return []
    scorer = Scorer({name: val[name] for name in captions})
    found = scorer.per_image_cider(
        {name: vocabulary.tokenize(text) for name, text in captions.items()}
    )
    return sorted((cider, name, captions[name]) for name, cider in found.items())


def _image(name: str, data: ReportData | None) -> Shown:
    if data is None:
        return Shown(name, "", ())
    path = data.images.get(name)
    return Shown(name, thumbnail(path) if path else "", data.references.get(name, ()))


@functools.lru_cache(maxsize=64)
def thumbnail(path: Path | TarMember) -> str:
    """Give a small JPEG of an image as a data URI, or nothing if it cannot be read."""
    try:
        image = load_image(path, THUMBNAIL)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode("ascii")


def _times(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Give seconds: of training and validation in all, and of an epoch."""
    training = [record["seconds"] for record in log if "seconds" in record]
    validation = [record["validation_seconds"] for record in log]
    both = [r["seconds"] + r["validation_seconds"] for r in log if "seconds" in r] or [0.0]
    return {
        "training": sum(training),
        "validation": sum(validation),
        "median": statistics.median(both),
        "quickest": min(both),
        "slowest": max(both),
    }
