"""Read captions from JSON: Karpathy's and COCO's layouts, lists and objects, and JSON Lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.datasets.caption_collector import SPLIT_WORDS, CaptionCollector, find_columns
from pipeline.datasets.images import IMAGE_EXTENSIONS
from pipeline.utils.errors import UserError

FILE_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])")


def read_json(path: Path, text: str, lines: list[str], collector: CaptionCollector) -> str:
    """Read a file that begins with a brace or bracket; return the layout's name.

    Both ``text`` and ``lines`` hold its content. Raises UserError for invalid JSON or an unknown
    structure.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        # One object per line is JSON Lines, whatever the file name; otherwise the JSON is broken.
        first = next(filter(str.strip, lines))
        if path.suffix.lower() != ".jsonl" and not isinstance(_parse_line(first), dict):
            raise UserError(f"{path}: not valid JSON ({error})") from error
        return _read_jsonl(lines, collector)
    if isinstance(document, dict) and "annotations" in document:
        return _read_coco(path, document, collector)
    if isinstance(document, dict) and "images" in document:
        return _read_karpathy(path, document, collector)
    if isinstance(document, list) and any(isinstance(record, dict) for record in document):
        # The format of BLIP, LAVIS and caption.py, including COCO results.
        for number, record in enumerate(document, 1):
            collector.add_record(f"entry {number}", record)
        return "JSON list"
    if path.suffix.lower() != ".json":
        return _read_jsonl(lines, collector)
    if not _is_mapping(document):
        raise UserError(
            f'{path}: neither "images" with "sentences" (Karpathy) nor "annotations" (COCO), nor a '
            'list of {"image", "caption"}, nor an object of captions by image'
        )
    for name, captions in document.items():
        collector.add(f'"{name}"', name, captions)
    return "JSON object"


def _is_mapping(document: Any) -> bool:
    """True for ``{"a.jpg": "caption"}`` and ``{"a": ["caption", ...]}``.

    An object of strings whose keys are not image files is something else, such as settings.
    """
    if not isinstance(document, dict) or find_columns((*map(str.lower, document),))[1]:
        return False  # or a single record, whose keys are column names
    return all(
        isinstance(value, list)
        or (isinstance(value, str) and Path(name).suffix.lower() in IMAGE_EXTENSIONS)
        for name, value in document.items()
    )


def split_of_file(path: Path) -> str:
    """Return the split in a file's name, such as captions_val2017.json; "" if there is none."""
    splits = {SPLIT_WORDS[word] for word in FILE_SPLIT.findall(path.stem.lower())}
    return splits.pop() if len(splits) == 1 else ""


def _read_jsonl(lines: list[str], collector: CaptionCollector) -> str:
    for number, line in enumerate(lines, 1):
        if line.strip():
            collector.add_record(f"line {number}", _parse_line(line))
    return "JSONL"


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_karpathy(path: Path, document: dict[str, Any], collector: CaptionCollector) -> str:
    images = _list_of(path, document, "images")
    if not any("sentences" in image for image in images if isinstance(image, dict)):
        raise UserError(f'{path}: no "sentences" in any of "images"; expected Karpathy\'s JSON')
    for number, image in enumerate(images, 1):
        where = f"image {number}"
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list) or not isinstance(image.get("filename"), str):
            collector.malformed(where)
            continue
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if folder else image["filename"]
        collector.add(where, name, sentences, image.get("split"), image.get("cocoid"))
    return "Karpathy JSON"


def _read_coco(path: Path, document: dict[str, Any], collector: CaptionCollector) -> str:
    collector.file_split = split_of_file(path)
    names: dict[str, str] = {}
    for number, image in enumerate(_list_of(path, document, "images"), 1):
        where = f"{path.name}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            collector.malformed(where)
            continue
        names[str(image.get("id"))] = image["file_name"]
        collector.add(where, image["file_name"], [], image_id=image.get("id"))
    for number, item in enumerate(_list_of(path, document, "annotations"), 1):
        where = f"{path.name}, annotation {number}"
        if not isinstance(item, dict) or "caption" not in item:
            collector.malformed(where)
        elif str(item.get("image_id")) not in names:
            collector.count("annotations of unknown images dropped", where)
        else:
            collector.add(where, names[str(item["image_id"])], item["caption"])
    return "COCO JSON"


def _list_of(path: Path, document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise UserError(f'{path}: "{key}" is missing or not a list')
    return value
