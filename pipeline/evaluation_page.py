"""The page that shows what a score is made of: every picture, its captions and references."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.evaluation import Evaluation, search_in_words
from pipeline.gallery import GalleryItem, write_gallery
from pipeline.progress import progress_bar


def write_page(result: Evaluation, run: str, target: Path) -> None:
    """Write the pictures of an evaluation, the worst caption first.

    A picture whose file is gone has an empty frame.

    Args:
        result: of ``evaluate_runs``.
        run: what the model is called.
        target: the HTML file.

    Raises:
        UserError: the file cannot be written.
    """
    total = len(result.pictures) + len(result.unreadable)
    items = progress_bar(_items(result), total=total, unit="image", desc="page")
    write_gallery(
        items, target, f"Captions of {result.facts['split']} by {run}", _facts(result, run)
    )


def _items(result: Evaluation) -> Iterator[GalleryItem]:
    for path, reason in result.unreadable.items():
        yield GalleryItem(path, str(path), (), error=reason)
    for picture in result.pictures:
        yield GalleryItem(
            picture.path,
            picture.name,
            picture.captions,
            references=picture.references,
            score=picture.cider,
        )


def _facts(result: Evaluation, run: str) -> dict[str, str]:
    """Say what was scored and how, then the scores with their intervals."""
    facts = result.facts
    described = {
        "Run": run,
        "Split": f"{facts['split']} ({facts['split_sha256']})",
        "Size": f"{facts['images']:,} images, {facts['references']:,} references",
        "Search": search_in_words(facts["search"]),
        "Date": time.strftime("%Y-%m-%d %H:%M"),
    }
    for name, value in result.scores.items():
        if name[0].isupper():  # not the counts of what differs
            interval = result.intervals.get(name)
            spread = f" (95 %: {interval.low:.1f} to {interval.high:.1f})" if interval else ""
            described[name] = f"{value:.1f}{spread}"
    described["Distinct captions"] = f"{result.scores['distinct_captions']:,}"
    return described
