"""Predictions written as text, JSON, JSON Lines, CSV or COCO results."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.captioner import Prediction
from pipeline.files import atomic_write
from pipeline.progress import progress_bar


def write_predictions(
    predictions: Iterable[Prediction], total: int, layout: str, output: Path | None
) -> dict[str, str]:
    """Write ``predictions`` to ``output``, or to standard output, as they come.

    Args:
        predictions: a stream of them.
        total: how many will come, for the progress bar on standard error.
        layout: ``text``, ``json``, ``jsonl``, ``csv`` or ``coco``.
        output: the file, written whole or not at all; None for standard output.

    Returns:
        Path and reason of each picture that could not be read.
    """
    failures: dict[str, str] = {}

    def watched() -> Iterator[Prediction]:
        # A bar would run through captions that appear on the same terminal.
        quiet = output is None and sys.stdout.isatty()
        for prediction in progress_bar(
            predictions, total=total, unit="image", desc="captioning", disable=quiet
        ):
            if prediction.error is not None:
                failures[prediction.path] = prediction.error
            yield prediction

    with _opened(output) as handle:
        WRITERS[layout](watched(), handle)
    return failures


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # not so by itself on Windows
        yield sys.stdout
        sys.stdout.flush()
    else:
        with atomic_write(output) as handle:
            yield handle


def printable(path: str) -> str:
    """Give a path as text that can be written: bytes that are no UTF-8 become marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def as_record(prediction: Prediction) -> dict[str, Any]:
    """Describe a prediction as JSON: image and captions, or image and error."""
    if prediction.error is not None:
        return {"image": printable(prediction.path), "error": prediction.error}
    captions = [
        {"caption": c.text, "log_probability": round(c.log_probability, 4)}
        for c in prediction.captions
    ]
    return {"image": printable(prediction.path), "captions": captions}


def _write_text(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    for prediction in predictions:
        for caption in prediction.captions:
            handle.write(f"{printable(prediction.path)}\t{caption.text}\n")
        handle.flush()


def _write_json(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    records = [as_record(prediction) for prediction in predictions]
    json.dump(records, handle, ensure_ascii=False, indent=2)
    handle.write("\n")


def _write_jsonl(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    for prediction in predictions:
        handle.write(json.dumps(as_record(prediction), ensure_ascii=False) + "\n")
        handle.flush()


def _write_csv(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(["image", "rank", "caption", "log_probability", "error"])
    for prediction in predictions:
        for rank, caption in enumerate(prediction.captions, start=1):
            score = round(caption.log_probability, 4)
            writer.writerow([printable(prediction.path), rank, caption.text, score, ""])
        if prediction.error is not None:
            writer.writerow([printable(prediction.path), "", "", "", prediction.error])
        handle.flush()


def _write_coco(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    results = [
        {"image_id": printable(prediction.path), "caption": caption.text}
        for prediction in predictions
        for caption in prediction.captions
    ]
    json.dump(results, handle, ensure_ascii=False, indent=2)
    handle.write("\n")


WRITERS: dict[str, Callable[[Iterable[Prediction], IO[str]], None]] = {
    "text": _write_text,
    "json": _write_json,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "coco": _write_coco,
}
