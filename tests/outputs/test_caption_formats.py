"""What caption.py writes is read as captions, corrected by hand, and added to."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipeline.captioner import Prediction
from pipeline.datasets.caption_table import read_captions
from pipeline.decoding.captions import Caption
from pipeline.outputs.formats import WRITERS, read_predictions, write_predictions

PREDICTIONS = [
    Prediction("photos/a.jpg", [Caption("a dog, running", -7.25), Caption("-a dog", -8.5)], None),
    Prediction("photos/=b.jpg", [Caption("a cat\t", -9.0)], None),
    Prediction("photos/c.jpg", [], "broken"),
]


@pytest.mark.parametrize("layout", WRITERS)
def test_every_format_is_a_captions_file(layout: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{'json' if layout == 'coco' else layout}"
    write_predictions(PREDICTIONS, layout, path)
    table, _ = read_captions(tmp_path, path).restrict(["photos/a.jpg", "=b.jpg"])
    second = "a cat\\t" if layout == "text" else "a cat"
    assert {image.name: image.captions for image in table.images} == {
        "photos/a.jpg": ("a dog, running", "-a dog"),
        "photos/=b.jpg": (second,),
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_a_byte_order_mark_is_no_part_of_the_first_name(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_predictions(PREDICTIONS[:1], layout, path)
    expected = read_predictions(path, layout)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [repr(p) for p in read_predictions(path, layout)] == [repr(p) for p in expected]


def test_a_table_that_excel_saved_is_added_to(tmp_path: Path) -> None:
    """With semicolons and decimal commas, as where the comma is the decimal sign."""
    path = tmp_path / "x.csv"
    write_predictions(PREDICTIONS, "csv", path)
    expected = read_predictions(path, "csv")
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.reader(handle))
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        writer = csv.writer(handle, delimiter=";")
        writer.writerows([*row[:3], row[3].replace(".", ","), *row[4:]] for row in rows)
    assert read_predictions(path, "csv") == expected
