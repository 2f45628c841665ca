"""Predictions files compared: how their images are found in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics.compare import compare_predictions
from pipeline.utils.errors import UserError

NUMBERS = range(6)
FILES = [f"COCO_val2014_{number:012}.jpg" for number in NUMBERS]
GOOD = [f"a dog beside tree number {word}" for word in "one two three four five six".split()]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Write a COCO captions file of six images; return the data folder."""
    data = tmp_path / "coco"
    (data / "annotations").mkdir(parents=True)
    document = {
        "images": [{"id": 7 * n, "file_name": name} for n, name in enumerate(FILES)],
        "annotations": [{"image_id": 7 * n, "caption": text} for n, text in enumerate(GOOD)],
    }
    (data / "annotations" / "captions_val2014.json").write_text(json.dumps(document))
    return data


def predictions(path: Path, images: list[Any], captions: list[str]) -> Path:
    entries = [{"image_id": i, "caption": c} for i, c in zip(images, captions, strict=True)]
    path.write_text(json.dumps(entries), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize(
    "images",
    [
        [7 * n for n in NUMBERS],
        [str(7 * n) for n in NUMBERS],
        FILES,
        [f"coco/val2014/{name}" for name in FILES],
        [f"/home/me/coco/val2014/{name}" for name in FILES],
        [f".\\val2014\\{name}" for name in FILES],
    ],
)
def test_ids_and_paths_are_resolved_against_the_data(
    coco: Path, tmp_path: Path, images: list[Any]
) -> None:
    first = predictions(tmp_path / "a.json", images, GOOD)
    second = predictions(tmp_path / "b.json", FILES[::-1], GOOD)
    found = compare_predictions(first, second, coco, None, "val")["BLEU-4"]
    assert found.first == pytest.approx(100) and found.second < 90
    for wrong in (999, "x.jpg"):
        other = predictions(tmp_path / "c.json", [*images[1:], wrong], GOOD)
        with pytest.raises(UserError, match=f"c.json: '{wrong}' is not in the val split"):
            compare_predictions(first, other, coco, None, "val")


def test_the_first_of_several_captions_counts_and_this_is_said(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = predictions(tmp_path / "a.json", FILES, GOOD)
    twice = predictions(tmp_path / "b.json", FILES * 2, GOOD + ["xyz"] * 6)
    found = compare_predictions(first, twice, coco, None, "val")["CIDEr-D"]
    assert found.first == found.second and found.p_value == 1
    assert capsys.readouterr().err == (
        f"{twice}: only the first caption of an image counts: 6 ignored\n"
    )
