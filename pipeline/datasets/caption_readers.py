"""Readers of captions files: Flickr8k's token file, CSV and TSV, and texts beside images.

Every reader adds its records to one ``CaptionCollector``; ``caption_table`` makes a table of it.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.datasets.caption_json import read_json
from pipeline.datasets.find_images import find_images
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

SPLITS = ("train", "val", "test")

# Column names of CSV, TSV and JSON Lines.
ALIASES = {
    "image": ("image", "file", "filename", "file_name", "image_name", "path", "name"),
    "caption": ("caption", "captions", "text", "comment", "sentence"),
    "split": ("split", "set", "subset"),
}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FLICKR8K_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+(?:\t(?P<caption>.*))?")

# No path is longer, on any system. Names are compared by all their tails, of which a name of a
# million slashes has as many.
MAX_NAME_LENGTH = 4096
# Characters, more than a page. Decoders are trained on 100 tokens at most, and Unicode's normal
# forms take quadratic time on a run of accents.
MAX_CAPTION_LENGTH = 10_000
UNMATCHED_TEXTS = ".txt files without one image of their name ignored"


class CaptionCollector:
    """Captions and splits by image name, as the readers find them, and notes on problems."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}  # cleaned
        self.splits: dict[str, str] = {}  # "train", "val" or "test", where a file has it
        self.split_source = ""  # where the splits came from, in words
        self._contested: set[str] = set()  # images that are in two splits
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # reason -> where it occurred first

    def count(self, reason: str, where: str = "") -> None:
        """Count one record that was dropped or repaired."""
        self._counts[reason] += 1
        if reason not in self._first:
            self._first[reason] = _clean(where)  # file names can hold line ends

    def malformed(self, where: str) -> None:
        """Count one record that was dropped because of its structure."""
        self.count("malformed lines or entries dropped", where)

    def add(self, where: str, name: object, captions: object, split: object = None) -> None:
        """Add one record; ``captions`` is a text or a list of texts."""
        cleaned = ""
        if isinstance(name, str) and len(name) <= MAX_NAME_LENGTH:
            cleaned = normalize_name(_encodable(name).strip())
        if not cleaned:
            self.malformed(where)
            return
        texts = self.captions.setdefault(cleaned, [])
        for caption in captions if isinstance(captions, list) else [captions]:
            if caption is not None and not isinstance(caption, str):
                self.count("captions that are not text dropped", where)
            elif text := _clean(caption or ""):
                if len(text) > MAX_CAPTION_LENGTH:
                    self.count(f"captions cut to {MAX_CAPTION_LENGTH:,} characters", where)
                    text = text[:MAX_CAPTION_LENGTH].rstrip()
                texts.append(text)
            else:
                self.count("empty captions dropped", where)
        self.set_split(cleaned, split)

    def add_record(self, where: str, record: dict[str, Any]) -> None:
        """Add one record whose keys are those of ``ALIASES``, in any case."""
        record = {key.strip().lower(): value for key, value in record.items()}
        name, captions, split = (
            next((record[alias] for alias in aliases if alias in record), None)
            for aliases in ALIASES.values()
        )
        self.add(where, name, captions, split)

    def set_split(self, name: str, word: object) -> None:
        """Set the image's split; the first known word counts."""
        word = "" if word is None else _clean(str(word)).lower()
        if not word:
            return
        split = SPLIT_WORDS.get(word)
        if split is None:
            self.count("unknown split names ignored", f'"{word[:30]}"')
        elif self.splits.setdefault(name, split) != split:
            self._contested.add(name)

    def finish(self) -> tuple[Counter[str], dict[str, list[str]]]:
        """Return the notes, and the images that have captions."""
        found = {name: texts for name, texts in self.captions.items() if texts}
        notes: Counter[str] = Counter()
        for reason, count in self._counts.items():
            first = self._first[reason]
            notes[f"{reason} (first: {first})" if first else reason] = count
        notes["images left with no caption dropped"] = len(self.captions) - len(found)
        notes["images in two splits, kept in the first"] = len(self._contested & found.keys())
        return +notes, found  # "+" drops the zeros


def _clean(text: str) -> str:
    return " ".join(_encodable(text).split())


def _encodable(text: str) -> str:
    # JSON can hold lone surrogates, which neither UTF-8 nor a checkpoint can.
    return text.encode("utf-8", "replace").decode("utf-8")


def normalize_name(path: str) -> str:
    """Return the form of a path in which names are compared."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")


def read_file(path: Path, collector: CaptionCollector) -> str:
    """Read one file of any layout, or a folder of images with texts; return the layout's name."""
    if path.is_dir():
        return _read_sidecars(path, collector)
    text = _read_text(path, collector)
    lines = _split_lines(text)
    if text.lstrip().startswith(("{", "[")):
        return read_json(path, text, lines, collector)
    first_lines = [line for line in lines[:100] if line.strip()][:10]
    # With the tab: a CSV line may well end in "we are #1".
    if any("\t" in line and TOKEN_LINE.fullmatch(line) for line in first_lines):
        _read_token_file(path, lines, collector)
        return "Flickr8k token file"
    columns = _read_delimited(path, lines, collector)
    is_kaggle = path.name == "captions.txt" and columns == ["image", "caption"]
    return "Flickr8k captions.txt" if is_kaggle else "CSV"


def read_shards(shards: TarShards, collector: CaptionCollector) -> str:
    """Read the texts beside images in tar shards; return the layout's name."""
    captions, unmatched = shards.read_captions()
    for name, lines in captions.items():
        collector.add(name, name, lines)
    for text in unmatched:
        collector.count(UNMATCHED_TEXTS, text)
    return "tar shards with .txt captions"


def _read_text(path: Path, collector: CaptionCollector) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        collector.count("file not UTF-8, read as Windows-1252", path.name)
        return content.decode("cp1252", "replace")


def _split_lines(text: str) -> list[str]:
    return re.split(r"\r\n|\n|\r", text)  # str.splitlines() would also cut at U+2028 and others


def find_sidecars(folder: Path) -> tuple[dict[Path, str], list[Path]]:
    """Find the text files beside images: file -> image, and files of no image or several.

    ``photo.txt`` belongs to ``photo.jpg``; ``photo.jpg.txt`` does, even beside ``photo.png``.
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
            if text.suffix.lower() != ".txt" or text.name.startswith(".") or not text.is_file():
                continue
            found = fitting[normalize_name(text.stem)]
            if len(found) == 1:
                images[text] = found[0]
            else:
                unmatched.append(text)
    return images, unmatched


def _read_sidecars(folder: Path, collector: CaptionCollector) -> str:
    images, unmatched = find_sidecars(folder)
    collector.split_source = "the names of the folders"
    # Only where both exist: a folder "train" alone may well be of locomotives.
    first = {name.partition("/")[0].lower() for name in images.values() if "/" in name}
    by_folder = {"train", "val"} <= {SPLIT_WORDS[word] for word in first & SPLIT_WORDS.keys()}
    for text, name in images.items():
        where = text.relative_to(folder).as_posix()
        lines = [line for line in _split_lines(_read_text(text, collector)) if line.strip()]
        split = name.partition("/")[0].lower() if by_folder and "/" in name else None
        collector.add(where, name, lines, split if split in SPLIT_WORDS else None)
    for text in unmatched:
        collector.count(UNMATCHED_TEXTS, text.relative_to(folder).as_posix())
    return "folder of .txt captions"


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
        collector.split_source = "Flickr_8k.*Images.txt beside the captions"
        for split, file in lists.items():
            for line in _read_text(file, collector).splitlines():
                collector.set_split(normalize_name(line.strip()), split)
    elif any(present):
        collector.count("incomplete split lists beside the captions ignored")


def _read_delimited(path: Path, lines: list[str], collector: CaptionCollector) -> list[str]:
    """Read CSV, TSV and their like; return the names of the columns."""
    start = next((index for index, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{path}: the file is empty")
    delimiter, columns, (image, caption, split) = _read_header(path, lines, start)
    collector.split_source = "the file's own split column"
    for number, fields in _rows(lines, start + 1, delimiter, len(columns)):
        while len(fields) > len(columns) and not fields[-1].strip():
            fields.pop()
        surplus = len(fields) - len(columns)
        if surplus > 0:  # unquoted delimiters in a caption
            parts = fields[caption : caption + surplus + 1]
            fields[caption : caption + surplus + 1] = [delimiter.join(parts)]
        if len(fields) <= max(image, caption):
            collector.malformed(f"line {number}")
            continue
        word = fields[split] if 0 <= split < len(fields) else None
        collector.add(f"line {number}", fields[image], fields[caption], word)
    return columns


def _read_header(path: Path, lines: list[str], start: int) -> tuple[str, list[str], list[int]]:
    """Return delimiter, column names, and the columns of image, caption and split (-1: none)."""
    for delimiter in (",", ";", "\t", "|"):
        columns = [name.strip().lower() for name in _fields(lines[start], delimiter)]
        places = [
            next((columns.index(alias) for alias in aliases if alias in columns), -1)
            for aliases in ALIASES.values()
        ]
        if min(places[:2]) >= 0:
            return delimiter, columns, places
    raise UserError(
        f"{path}, line {start + 1}: no header with an image and a caption column"
        f' (it reads "{_clean(lines[start])[:60]}"); begin the file with "image,caption"'
    )


def _rows(
    lines: list[str], start: int, delimiter: str, width: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each record from line ``start`` (0-based) on.

    A quoted caption may run over line ends, but never over a line that is a whole record by
    itself: an unclosed quote spoils one line, not all that follow.
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
    except csv.Error:  # too long, or a line end outside quotes
        return []
