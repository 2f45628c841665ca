"""Writers and readers of predictions: text, JSON, JSON Lines, CSV and COCO results."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.captioner import Prediction
from pipeline.datasets.caption_readers import FORMULA, PREDICTION_COLUMNS, text_of_cell
from pipeline.decoding.captions import Caption, Word
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.terminal import as_json, escape_control

# Line ends and tabs are quoted; Python 3.12 and older do not quote carriage returns.
KEPT_IN_CSV = "\t\n"


def write_predictions(predictions: Iterable[Prediction], layout: str, output: Path | None) -> None:
    """Write predictions to a file or to standard output, each as soon as it arrives.

    Args:
        predictions: a stream.
        layout: ``text``, ``json``, ``jsonl``, ``csv`` or ``coco``.
        output: the file, written whole or not at all; None for standard output.
    """
    if output is not None:
        with atomic_write(output) as handle:
            WRITERS[layout](predictions, handle)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # not the default on Windows
    WRITERS[layout](predictions, sys.stdout)
    sys.stdout.flush()


def decodable(path: str) -> str:
    """Return a path as text that can be written: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


def name_in(path: str, layout: str) -> str:
    """Return the name of an image as ``read_predictions`` reads it from a file of this layout."""
    kept = {"text": "", "csv": KEPT_IN_CSV}.get(layout)
    return decodable(path) if kept is None else escape_control(decodable(path), kept)


def as_record(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as JSON: image and captions, or image and error."""
    record: dict[str, Any] = {"image": decodable(prediction.path)}
    if prediction.error is not None:
        return {**record, "error": prediction.error}
    record["captions"] = []
    for caption in prediction.captions:
        score = round(caption.log_probability, 4)
        record["captions"].append({"caption": caption.text, "log_probability": score})
        if caption.words:
            record["captions"][-1]["words"] = [_word(word) for word in caption.words]
        if caption.score_parts:
            parts = {name: round(part, 4) for name, part in caption.score_parts.items()}
            record["captions"][-1]["score_parts"] = parts
    return record


def _word(word: Word) -> dict[str, Any]:
    record = {"text": word.text, "probability": round(word.probability, 4)}
    return {**record, **({"cells": [round(c, 4) for c in word.cells]} if word.cells else {})}


def from_record(record: dict[str, Any]) -> Prediction:
    """Return the prediction from a record made by ``as_record``.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: it is not such a record.
    """
    captions = [
        Caption(
            caption["caption"],
            caption["log_probability"],
            tuple(
                Word(word["text"], word["probability"], tuple(word.get("cells", ())))
                for word in caption.get("words", ())
            ),
            caption.get("score_parts", {}),
        )
        for caption in record.get("captions", ())
    ]
    error = record["error"] if not captions else None
    return Prediction(record["image"], captions, error)


def _write_text(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    for prediction in predictions:
        several = len(prediction.captions) > 1
        for caption in prediction.captions:
            score = f"\t{caption.log_probability:.4f}" if several else ""
            name = name_in(prediction.path, "text")
            handle.write(f"{name}\t{escape_control(caption.text)}{score}\n")
        handle.flush()


def _write_json(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    records = [as_record(prediction) for prediction in predictions]
    handle.write(as_json(records, indent=2) + "\n")


def _write_jsonl(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    for prediction in predictions:
        handle.write(as_json(as_record(prediction)) + "\n")
        handle.flush()


def _write_csv(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(PREDICTION_COLUMNS)
    for prediction in predictions:
        name = _cell(name_in(prediction.path, "csv"))
        for rank, caption in enumerate(prediction.captions, start=1):
            score = round(caption.log_probability, 4)
            writer.writerow([name, rank, _cell(caption.text), score, ""])
        if prediction.error is not None:
            writer.writerow([name, "", "", "", _cell(prediction.error)])
        handle.flush()


def _cell(text: str) -> str:
    """Return text that a spreadsheet shows instead of evaluating it."""
    text = escape_control(text, KEPT_IN_CSV)
    return f"'{text}" if FORMULA.match(text) else text


def _write_coco(predictions: Iterable[Prediction], handle: IO[str]) -> None:
    results = [
        {"image_id": decodable(prediction.path), "caption": caption.text}
        for prediction in predictions
        for caption in prediction.captions
    ]
    handle.write(as_json(results, indent=2) + "\n")


WRITERS: dict[str, Callable[[Iterable[Prediction], IO[str]], None]] = {
    "text": _write_text,
    "json": _write_json,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "coco": _write_coco,
}


def read_predictions(path: Path, layout: str) -> list[Prediction]:
    """Read what ``write_predictions`` wrote in this layout: one prediction per image.

    Probabilities that the layout does not store are NaN.

    Raises:
        UserError: the file cannot be read, or is not in this layout.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found: dict[str, Prediction] = {}
        for prediction in READERS[layout](text):
            known = found.setdefault(prediction.path, prediction)
            if known is not prediction:
                known.captions.extend(prediction.captions)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not in --format {layout}, so nothing can be added to it; choose the format "
            "that it has, or another --output"
        ) from error
    return list(found.values())


def _read_text(text: str) -> Iterator[Prediction]:
    for line in text.split("\n"):
        if line:
            image, caption, *score = line.split("\t")
            yield Prediction(image, [Caption(caption, float(score[0]) if score else math.nan)])


def _read_csv(text: str) -> Iterator[Prediction]:
    # Excel saves CSV with semicolons and decimal commas in locales that use the latter.
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if reader.fieldnames != PREDICTION_COLUMNS:
        raise ValueError(f"columns {reader.fieldnames}")
    for row in reader:
        image = text_of_cell(row["image"])
        if row["error"]:
            yield Prediction(image, [], text_of_cell(row["error"]))
        else:
            score = float(row["log_probability"].replace(",", "."))
            yield Prediction(image, [Caption(text_of_cell(row["caption"]), score)])


def _read_coco(text: str) -> Iterator[Prediction]:
    for record in json.loads(text):
        yield Prediction(record["image_id"], [Caption(record["caption"], math.nan)])


READERS: dict[str, Callable[[str], Iterator[Prediction]]] = {
    "text": _read_text,
    "json": lambda text: map(from_record, json.loads(text)),
    "jsonl": lambda text: (from_record(json.loads(line)) for line in text.split("\n") if line),
    "csv": _read_csv,
    "coco": _read_coco,
}
