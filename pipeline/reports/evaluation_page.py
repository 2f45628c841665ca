"""The page of an evaluation: every image with its captions and references, worst first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.decoding.options import describe_search
from pipeline.evaluation import Evaluation
from pipeline.outputs.gallery import GalleryItem, write_gallery
from pipeline.utils.html import counted
from pipeline.utils.progress import progress_bar


def write_page(result: Evaluation, run: str, target: Path) -> None:
    """Write the images of an evaluation of the model ``run`` to the HTML file ``target``.

    An image whose file is gone has an empty frame.

    Raises:
        UserError: the file cannot be written.
    """
    total = len(result.images) + len(result.unreadable)
    items = progress_bar(_items(result), total=total, unit="image", desc="page")
    title = f"Captions of {result.facts['split']} by {run}"
    write_gallery(items, target, title, _facts(result, run), tiles=_tiles(result))


def _items(result: Evaluation) -> Iterator[GalleryItem]:
    for path, reason in result.unreadable.items():
        yield GalleryItem(path, str(path), (), error=reason)
    for image in result.images:
        yield GalleryItem(
            image.path, image.name, image.captions, references=image.references, score=image.cider
        )


def _facts(result: Evaluation, run: str) -> dict[str, str]:
    """Return what was scored and how."""
    facts = result.facts
    return {
        "Model": run,
        "Split": f"{facts['split']} ({facts['split_sha256']})",
        "Search": describe_search(facts["search"]),
        "Distinct captions": f"{result.scores['distinct_captions']:,}",
        "Date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _tiles(result: Evaluation) -> list[tuple[str, str, str]]:
    """Return the scores, CIDEr-D first, with their intervals; then the size of the split."""
    names = [name for name in result.scores if name[0].isupper()]  # scores, not counts
    tiles = []
    for name in sorted(names, key=lambda name: name != "CIDEr-D"):
        interval = result.intervals.get(name)
        note = f"95 %: {interval.low:.1f} to {interval.high:.1f}" if interval else ""
        tiles.append((name, f"{result.scores[name]:.1f}", note))
    facts = result.facts
    return [*tiles, ("Images", f"{facts['images']:,}", counted(facts["references"], "reference"))]
