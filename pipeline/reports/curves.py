"""The curves of a run: losses, scores and learning rate over the epochs, as SVG and PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.training.loop import Progress
from pipeline.training.run_folder import CURVES, CURVES_PNG, LOG, read_epochs
from pipeline.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Title -> label in the legend -> name in the log.
PANELS = {
    "Loss, nats per word": {"train": "train_loss", "val": "val_loss"},
    "Score on val, percent": {
        "CIDEr-D": "CIDEr-D",
        "BLEU-4": "BLEU-4",
        "reward of sampled captions": "reward",
    },
    "Learning rate": {"learning rate": "learning_rate"},
}
HEIGHTS = [3, 3, 1]
COLORS = ["#0969da", "#bc4c00", "#1a7f37"]
BEST_COLOR = "#5c6068"
# The same log gives the same bytes; text stays text.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "curves",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKED_EPOCHS = 60  # with more epochs points are not marked


def best_record(log: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the record of the epoch whose checkpoint was kept."""
    progress, best = Progress(), log[0]
    for record in log:
        if progress.update(record):
            best = record
    return best


def write_curves(run: Path) -> None:
    """Draw ``curves.svg`` and ``curves.png`` of a run folder, if its log has an epoch."""
    log = read_epochs(run / LOG)
    if not log:
        return
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw_curves(log)
        for name, metadata in ((CURVES, {"Date": None}), (CURVES_PNG, {})):
            with atomic_write(run / name, "wb") as handle:
                figure.savefig(handle, format=Path(name).suffix[1:], dpi=120, metadata=metadata)


def read_svg(run: Path) -> str:
    """Return ``curves.svg`` of a run folder as an element to embed in a page.

    Hovering over an epoch shows its values.
    """
    text = (run / CURVES).read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    epochs = {record["epoch"]: record for record in read_epochs(run / LOG)}

    def with_title(found: re.Match[str]) -> str:
        record = epochs.get(int(found[1]), {})
        values = {label: _value(record, name) for s in PANELS.values() for label, name in s.items()}
        lines = [f"{label} {value:.4g}" for label, value in values.items() if value == value]
        return f"{found[0]}<title>epoch {found[1]}\n" + "\n".join(lines) + "</title>"

    return re.sub(r'<g id="epoch-(\d+)">', with_title, text)


def draw_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the epochs of a log, at least one; a value that is missing or not finite is a gap."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6.6))
    figure.subplots_adjust(left=0.09, right=0.98, top=0.95, bottom=0.07, hspace=0.28)
    panels = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=HEIGHTS)
    best = best_record(log)
    for axes, (title, series) in zip(panels, PANELS.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
        axes.axvline(best["epoch"], color=BEST_COLOR, linestyle="--", linewidth=1.2)
        _draw_series(axes, log, series)
        if "CIDEr-D" in series:  # scores near 0 become a flat line
            axes.set_ylim(top=max(axes.get_ylim()[1], 1.0))
        for record in log:  # hover targets, see ``read_svg``
            epoch = record["epoch"]
            axes.axvspan(epoch - 0.5, epoch + 0.5, alpha=0, linewidth=0, gid=f"epoch-{epoch}")
    title = f"best: epoch {best['epoch']}, CIDEr-D {best['CIDEr-D']:.1f}"
    panels[0].set_title(title, loc="right", fontsize=10, color=BEST_COLOR)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _draw_series(axes: Axes, log: Sequence[Mapping[str, Any]], series: Mapping[str, str]) -> None:
    epochs = [record["epoch"] for record in log]
    for color, (label, name) in zip(COLORS, series.items(), strict=False):
        values = [_value(record, name) for record in log]
        if not all(map(math.isnan, values)):
            marker = "." if len(log) <= MARKED_EPOCHS else ""
            axes.plot(epochs, values, color=color, label=label, marker=marker, linewidth=1.6)
    if len(series) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best")


def _value(record: Mapping[str, Any], name: str) -> float:
    """Return a value of an epoch's record, NaN where there is none to draw."""
    if name == "train_loss" and "reward" in record:
        return math.nan  # the loss of self-critical epochs has another unit
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
