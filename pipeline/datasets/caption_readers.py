"""Captions file readers: Flickr8k's token file, CSV and TSV, and text files beside images.

Every reader adds its records to one ``CaptionCollector``; ``caption_table`` turns it into a table.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.caption_collector import (
    CaptionCollector,
    clean,
    find_columns,
    normalize_name,
)
from pipeline.datasets.caption_json import read_json
from pipeline.datasets.find_images import find_images
from pipeline.datasets.images import IMAGE_EXTENSIONS
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

FLICKR8K_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+(?:\t(?P<caption>.*))?")

# Output of caption.py: lines of text without a header, and the columns of a table.
ENDINGS = "|".join(re.escape(extension) for extension in sorted(IMAGE_EXTENSIONS))
TEXT_LINE = re.compile(rf"[^\t]+(?:{ENDINGS})\t.*", re.IGNORECASE)
LOG_PROBABILITY = re.compile(r"-?\d+\.\d+")
PREDICTION_COLUMNS = ["image", "rank", "caption", "log_probability", "error"]
# Text that a spreadsheet evaluates as a formula, or takes for one; see docs/file-formats.md.
FORMULA = re.compile("'*[=+\\-@\\t\\n]")

# Captions files beside an image; those of kohya's training scripts take precedence.
SIDECARS = (".caption", ".txt")
UNMATCHED_TEXTS = "text files without one image of their name ignored"


def read_file(path: Path, collector: CaptionCollector) -> str:
    """Read one file of any layout, or the text files beside images; return the layout's name."""
    if path.is_dir():
        return _read_sidecars(path, collector)
    text = collector.read_text(path)
    lines = _split_lines(text)
    if text.lstrip().startswith(("{", "[")):
        return read_json(path, text, lines, collector)
    first_lines = [line for line in lines[:100] if line.strip()][:10]
    # A tab is required: a CSV line may well end in "we are #1".
    if any("\t" in line and TOKEN_LINE.fullmatch(line) for line in first_lines):
        _read_token_file(path, lines, collector)
        return "Flickr8k token file"
    if first_lines and TEXT_LINE.fullmatch(first_lines[0]):
        _read_text_lines(lines, collector)
        return "text with tabs"
    columns = _read_delimited(path, lines, collector)
    is_kaggle = path.name == "captions.txt" and columns == ["image", "caption"]
    return "Flickr8k captions.txt" if is_kaggle else "CSV"


def read_shards(shards: TarShards, collector: CaptionCollector) -> str:
    """Read the text files beside images in tar shards; return the layout's name."""
    captions, unmatched = shards.read_captions()
    for name, content in captions.items():
        text = collector.decode(content, name, name)
        collector.add(name, name, [line for line in _split_lines(text) if line.strip()])
    for text in unmatched:
        collector.count(UNMATCHED_TEXTS, text)
    return "tar shards with .txt captions"


def _split_lines(text: str) -> list[str]:
    return re.split(r"\r\n|\n|\r", text)  # str.splitlines() also splits at U+2028 and others


def find_sidecars(folder: Path) -> tuple[dict[Path, str], list[Path]]:
    """Find the text files beside images: file -> image, and files that fit no image or several.

    ``photo.txt`` and ``photo.caption`` belong to ``photo.jpg``; so does ``photo.jpg.txt``, even
    beside ``photo.png``.
    """
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in find_images(folder):
        by_folder[name.rpartition("/")[0]].append(name)
    images: dict[Path, str] = {}
    unmatched: list[Path] = []
    for parent, names in sorted(by_folder.items()):
        fitting: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            fitting[normalize_name(Path(name).stem)].append(name)
        fitting.update({normalize_name(Path(name).name): [name] for name in names})
        for text in sorted((folder / parent).iterdir()):
            is_text = text.suffix.lower() in SIDECARS and not text.name.startswith(".")
            if not is_text or not text.is_file():
                continue
            found = fitting[normalize_name(text.stem)]
            if len(found) == 1:
                images[text] = found[0]
            else:
                unmatched.append(text)
    return images, unmatched


def _read_sidecars(folder: Path, collector: CaptionCollector) -> str:
    images, unmatched = find_sidecars(folder)
    endings = {name: text.suffix.lower() for text, name in sorted(images.items(), reverse=True)}
    for text, name in images.items():
        where = text.relative_to(folder).as_posix()
        if text.suffix.lower() != endings[name]:
            collector.count(".txt files beside a .caption file of the same image ignored", where)
            continue
        lines = [line for line in _split_lines(collector.read_text(text)) if line.strip()]
        collector.add(where, name, lines)
    for text in unmatched:
        collector.count(UNMATCHED_TEXTS, text.relative_to(folder).as_posix())
    return f"folder of {' and '.join(sorted(set(endings.values())))} captions"


def _read_token_file(path: Path, lines: list[str], collector: CaptionCollector) -> None:
    for number, line in enumerate(lines, 1):
        parts = TOKEN_LINE.fullmatch(line)
        if parts:
            collector.add(f"line {number}", parts["name"], parts["caption"])
        elif line.strip():
            collector.malformed(f"line {number}")
    lists = {split: path.with_name(name) for split, name in FLICKR8K_LISTS.items()}
    present = [file.is_file() for file in lists.values()]
    if all(present):
        source = "Flickr_8k.*Images.txt beside the captions"
        for split, file in lists.items():
            for line in collector.read_text(file).splitlines():
                collector.set_split(normalize_name(line.strip()), split, source)
    elif any(present):
        collector.count("incomplete split lists beside the captions ignored")


def _read_text_lines(lines: list[str], collector: CaptionCollector) -> None:
    for number, line in enumerate(lines, 1):
        name, *captions = line.split("\t")
        if len(captions) > 1 and LOG_PROBABILITY.fullmatch(captions[-1]):
            captions.pop()
        if captions:
            collector.add(f"line {number}", name, captions)
        elif line.strip():
            collector.malformed(f"line {number}")


def _read_delimited(path: Path, lines: list[str], collector: CaptionCollector) -> list[str]:
    """Read CSV, TSV and similar files; return the column names."""
    start = next((index for index, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{path}: the file is empty")
    delimiter, columns = _read_header(path, lines, start)
    image, captions, split = find_columns(tuple(columns))
    is_own = {*PREDICTION_COLUMNS} <= {*columns}
    for number, fields in _rows(lines, start + 1, delimiter, len(columns)):
        while len(fields) > len(columns) and not fields[-1].strip():
            fields.pop()
        surplus = len(fields) - len(columns)
        if surplus > 0 and len(captions) == 1:  # unquoted delimiters in a caption
            parts = fields[captions[0] : captions[0] + surplus + 1]
            fields[captions[0] : captions[0] + surplus + 1] = [delimiter.join(parts)]
        if not max(image, captions[0]) < len(fields) <= len(columns):
            collector.malformed(f"line {number}")
            continue
        if is_own:
            fields = [text_of_cell(field) for field in fields]
        found = [fields[place] for place in captions if place < len(fields)]
        word = fields[split] if 0 <= split < len(fields) else None
        collector.add(f"line {number}", fields[image], found, word)
    return columns


def text_of_cell(cell: str) -> str:
    """Return a text without the apostrophe that keeps a spreadsheet from evaluating it."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def _read_header(path: Path, lines: list[str], start: int) -> tuple[str, list[str]]:
    """Return the delimiter and the column names."""
    for delimiter in (",", ";", "\t", "|"):
        columns = [name.strip().lower() for name in _fields(lines[start], delimiter)]
        image, captions, _ = find_columns(tuple(columns))
        if image >= 0 and captions:
            return delimiter, columns
    raise UserError(
        f"{path}, line {start + 1}: no header with an image and a caption column"
        f' (it reads "{clean(lines[start])[:60]}"); begin the file with "image,caption"'
    )


def _rows(
    lines: list[str], start: int, delimiter: str, width: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each record, beginning at line ``start`` (0-based).

    A quoted caption may span lines, but never a line that is a whole record by itself: an
    unclosed quote spoils one line, not all that follow.
    """
    position = start
    while position < len(lines):
        number, row = position + 1, lines[position]
        position += 1
        end, is_open = position, row.count('"') % 2 == 1
        while is_open and end < min(len(lines), position + 50):
            if len(_fields(lines[end], delimiter)) >= width:
                break
            is_open ^= lines[end].count('"') % 2 == 1
            end += 1
        if end > position and not is_open:
            row, position = "\n".join(lines[position - 1 : end]), end
        if row.strip():
            yield number, _fields(row, delimiter)


def _fields(row: str, delimiter: str) -> list[str]:
    if '"' not in row:
        return row.split(delimiter)
    try:
        return next(csv.reader([row], delimiter=delimiter), [])
    except csv.Error:  # too long, or a line break outside quotes
        return []
