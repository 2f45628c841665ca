"""The curves of a run as an SVG: losses, scores and learning rate over the epochs.

A drawing holds its own colours for light and dark, and neither script nor font; it can stand in a
page, or be opened as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training.run_folder import CURVES, LOG, read_epochs
from pipeline.utils.files import atomic_write

# All lengths are pixels of the drawing.
WIDTH = 720
LEFT, RIGHT = 62, 14  # of a panel: room for the ticks' labels
TITLE, GAP = 34, 22  # above a panel: its title and legend; below: space
BOTTOM = 44  # below the last panel: the epochs


@dataclass(frozen=True)
class PanelKind:
    """One of the drawing's panels.

    Attributes:
        title: what its axis shows.
        height: of the plot itself.
        series: name in the legend to name in the log.
        from_zero: whether the axis begins at 0.
    """

    title: str
    height: int
    series: Mapping[str, str]
    from_zero: bool


PANELS = (
    PanelKind("loss, nats a word", 190, {"train": "train_loss", "val": "val_loss"}, False),
    PanelKind(
        "score on val, percent",
        190,
        {"CIDEr-D": "CIDEr-D", "BLEU-4": "BLEU-4", "reward of drawn captions": "reward"},
        True,
    ),
    PanelKind("learning rate", 80, {"learning rate": "learning_rate"}, True),
)


@dataclass(frozen=True)
class Series:
    """A drawn series.

    Attributes:
        name: in the legend.
        number: which colour it has.
        legend: where its legend begins, from the left.
        lines: stretches without a gap; each point with x, y, epoch and value in words.
    """

    name: str
    number: int
    legend: float
    lines: list[list[dict[str, Any]]]

    def points(self, line: Sequence[Mapping[str, Any]]) -> str:
        """Give a line's points as SVG has them."""
        return " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in line)


@dataclass(frozen=True)
class Panel:
    """A drawn panel: its title, top and bottom, ticks (place and label), and series."""

    title: str
    top: float
    bottom: float
    ticks: list[tuple[float, str]]
    series: list[Series]


def write_curves(run: Path) -> None:
    """Draw ``log.jsonl`` of a run folder into its ``curves.svg``; without an epoch, nothing."""
    log = read_epochs(run / LOG)
    if log:
        with atomic_write(run / CURVES) as handle:
            handle.write(draw_curves(log))


def draw_curves(log: Sequence[Mapping[str, Any]]) -> str:
    """Draw the epochs of a log, at least one, as an SVG.

    What an epoch does not have, or is no finite number, leaves a gap.
    """
    from pipeline.utils.html import environment

    epochs = [record["epoch"] for record in log]
    first, last = min(epochs), max(epochs)
    inner = WIDTH - LEFT - RIGHT

    def place(epoch: float) -> float:
        return LEFT + inner * ((epoch - first) / (last - first) if last > first else 0.5)

    panels: list[Panel] = []
    top = 0.0
    for kind in PANELS:
        top += TITLE
        panel = _panel(kind, log, top, place)
        if panel is not None:
            panels.append(panel)
            top = panel.bottom + GAP
        else:
            top -= TITLE
    best = best_record(log)
    ticks = [epoch for epoch in round_ticks(first, last, 10, whole=True) if first <= epoch <= last]
    bottom = panels[-1].bottom if panels else TITLE
    return environment().get_template("curves.svg").render(
        width=WIDTH,
        height=bottom + BOTTOM,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=bottom,
        top=panels[0].top if panels else TITLE,
        panels=panels,
        epochs=[(place(epoch), f"{epoch:g}") for epoch in ticks],
        best=best,
        best_x=place(best["epoch"]),
        dots=len(log) <= 60,
    )  # fmt: skip


def best_record(log: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Find the epoch with the best CIDEr-D, of equal ones that with the lowest val loss."""
    return max(log, key=lambda record: (record["CIDEr-D"], -record["val_loss"]))


def _panel(
    kind: PanelKind, log: Sequence[Mapping[str, Any]], top: float, place: Any
) -> Panel | None:
    """Lay out one panel; None where the log has nothing for it."""
    found = {name: [(r["epoch"], _value(r, key)) for r in log] for name, key in kind.series.items()}
    values = [value for pairs in found.values() for _, value in pairs if value is not None]
    if not values:
        return None
    ticks = round_ticks(0.0 if kind.from_zero else min(values), max(values), kind.height // 38)
    low, high = ticks[0], ticks[-1]
    bottom = top + kind.height
    series: list[Series] = []
    legend = float(LEFT + 8 * len(kind.title) + 18)
    for number, (name, pairs) in enumerate(found.items()):
        lines: list[list[dict[str, Any]]] = [[]]
        for epoch, value in pairs:
            if value is None:
                lines.append([])
                continue
            y = bottom - kind.height * (value - low) / (high - low)
            words = f"epoch {epoch:g}: {name} {value:.4g}"
            lines[-1].append({"x": place(epoch), "y": y, "words": words})
        lines = [line for line in lines if line]
        if lines:
            series.append(Series(name, number, legend, lines))
            legend += 7.5 * len(name) + 44
    height = kind.height / (high - low)
    labels = [(bottom - (tick - low) * height, f"{tick:g}") for tick in ticks]
    return Panel(kind.title, top, bottom, labels, series)


def _value(record: Mapping[str, Any], key: str) -> float | None:
    """Give what an epoch's line says, if it is a number that can be drawn."""
    if key == "train_loss" and "reward" in record:
        return None  # of drawn captions, which has another unit
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def round_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Choose about ``count`` ticks, 1, 2 or 5 times a power of ten apart, that span a range.

    Args:
        low, high: the range; both may be the same.
        count: how many are wanted; there are fewer to twice as many.
        whole: whether only whole numbers may be marked.
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    step = max(1.0, step) if whole else step
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    end = max(end, start + 1)
    return [float(f"{number * step:.10g}") for number in range(start, end + 1)]
