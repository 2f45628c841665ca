"""Find the captions of a data set and read them, whatever their layout.

The folder is searched in this order, and what is found first is read:

1. ``Flickr8k.token.txt`` (also in ``Flickr8k_text/``): ``name.jpg#0<TAB>caption``
2. ``captions.txt``: Kaggle's copy of Flickr8k, ``image,caption``
3. ``dataset*.json``: Karpathy's JSON; its ``restval`` is train
4. ``captions_*.json`` (also in ``annotations/``): COCO; several files make one table
5. ``captions.csv``, else the one ``*.csv`` or ``*.tsv``: a header, then a caption a line
6. ``captions.jsonl``, ``metadata.jsonl``, else the one ``*.jsonl``: an object a line
7. text files beside the images, ``photo.txt`` or ``photo.jpg.txt``: a caption a line

CSV, TSV and JSONL name their columns ``image`` and ``caption`` (or one of the usual
synonyms, see ``ALIASES``) and may have a ``split``. A file that is named outright may have
any name: its content tells the layout. A folder that is named holds images with text files.

Every reader adds its records to one ``Gathered``; ``caption_table`` makes a table of it.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.datasets.sidecar_captions import find_sidecars
from pipeline.datasets.tar_shards import TarShards
from pipeline.utils.errors import UserError

SPLITS = ("train", "val", "test")

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
# The first group with a file in the folder is read. A choice between several files of a
# group is the user's to make, but for COCO, which comes as a file a split.
COCO_FILES = ("captions_*.json", "annotations/captions_*.json")
SEARCH_ORDER = (
    ("Flickr8k.token.txt",),
    ("Flickr8k_text/Flickr8k.token.txt",),
    ("captions.txt",),
    ("dataset*.json",),
    COCO_FILES,
    ("captions.csv",),
    ("*.csv", "*.tsv"),
    ("captions.jsonl",),
    ("metadata.jsonl",),
    ("*.jsonl",),
)

TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+(?:\t(?P<caption>.*))?")
STRAY_NAME = re.compile(r"(?P<name>.+\.(?:jpe?g|png|gif|bmp|webp|tiff?))\.\d+", re.IGNORECASE)
FILE_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])")

MALFORMED = "malformed lines or entries dropped"

# No path is longer, on any system. Names are compared by all their ends, of which a name of a
# million slashes has as many.
LONGEST_NAME = 4096
# Characters, more than a page. Decoders are trained on 100 tokens at most, and Unicode's normal
# forms take a time that grows with the square of a run of accents.
LONGEST_CAPTION = 10_000


class CaptionCollector:
    """What the readers found so far: captions and splits by image name, and notes.

    Attributes:
        captions: image name -> its captions, cleaned.
        splits: image name -> "train", "val" or "test", where a file says so.
        split_source: where the splits came from, in words.
    """

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.split_source = ""
        self.contested: set[str] = set()  # images that are in two splits
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> where it was first met

    def count(self, reason: str, where: str = "") -> None:
        """Count one thing that was dropped or mended, and keep where it was met first."""
        self.counts[reason] += 1
        if reason not in self.first:
            self.first[reason] = _clean(where)  # names of files can hold line ends

    def add(self, where: str, name: object, captions: object, split: object = None) -> None:
        """Take one record; ``captions`` is a text or a list of texts."""
        cleaned = ""
        if isinstance(name, str) and len(name) <= LONGEST_NAME:
            cleaned = normalize_name(_printable(name).strip())
        if not cleaned:
            self.count(MALFORMED, where)
            return
        texts = self.captions.setdefault(cleaned, [])
        for caption in captions if isinstance(captions, list) else [captions]:
            if caption is not None and not isinstance(caption, str):
                self.count("captions that are not text dropped", where)
            elif text := _clean(caption or ""):
                if len(text) > LONGEST_CAPTION:
                    self.count(f"captions cut to {LONGEST_CAPTION:,} characters", where)
                    text = text[:LONGEST_CAPTION].rstrip()
                texts.append(text)
            else:
                self.count("empty captions dropped", where)
        self.set_split(cleaned, split)

    def set_split(self, name: str, word: object) -> None:
        """Note the image's split; the first word that is understood stands."""
        word = "" if word is None else _clean(str(word)).lower()
        if not word:
            return
        split = SPLIT_WORDS.get(word)
        if split is None:
            self.count("unknown split names ignored", f'"{word[:30]}"')
        elif self.splits.setdefault(name, split) != split:
            self.contested.add(name)

    def finish(self) -> tuple[Counter[str], dict[str, list[str]]]:
        """Return the notes, and the images that have captions, stray ids mended."""
        for name in list(self.captions):
            stray = STRAY_NAME.fullmatch(name)
            if stray and stray["name"] in self.captions:
                self.captions[stray["name"]] += self.captions.pop(name)
                self.count("stray ids repaired", name)
        found = {name: texts for name, texts in self.captions.items() if texts}
        notes = Counter(
            {
                f"{reason} (first: {self.first[reason]})" if self.first[reason] else reason: count
                for reason, count in self.counts.items()
            }
        )
        notes["images left with no caption dropped"] = len(self.captions) - len(found)
        notes["images in two splits, kept in the first"] = len(self.contested & found.keys())
        return +notes, found  # "+" drops the zeros


def _clean(text: str) -> str:
    return " ".join(_printable(text).split())


def _printable(text: str) -> str:
    # JSON can hold lone surrogates, which neither UTF-8 nor a checkpoint can.
    return text.encode("utf-8", "replace").decode("utf-8")


def normalize_name(path: str) -> str:
    """Bring a path to the one form in which names are compared."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")


def find_files(data: Path, captions: Path | None) -> list[Path]:
    """List the captions files to read: the one named ``captions``, or those found in ``data``.

    A folder stands for the text files beside its images.

    Raises:
        UserError: there is none, or several compete.
    """
    if captions is not None:
        for path in (captions, data / captions):
            if path.is_file() or (path.is_dir() and find_sidecars(path).images):
                return [path]
        raise UserError(f"{captions}: no such file; --captions names the file with the captions")
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; --data names the folder of a data set")
    for patterns in SEARCH_ORDER:
        # By file name, as the same COCO file may lie in both places.
        found = {path.name: path for pattern in patterns for path in sorted(data.glob(pattern))}
        # macOS leaves ._x.csv beside x.csv; Hugging Face's dataset_info.json holds no captions.
        ignored = (".", "dataset_info")
        paths = [found[name] for name in sorted(found) if not name.startswith(ignored)]
        if len(paths) > 1 and patterns is not COCO_FILES:
            names = ", ".join(path.name for path in paths[:5])
            raise UserError(f"{data}: several captions files ({names}); choose with --captions")
        if paths:
            return paths
    if find_sidecars(data).images:
        return [data]
    looked_for = ", ".join(pattern for patterns in SEARCH_ORDER for pattern in patterns)
    raise UserError(
        f"{data}: no captions file; looked for {looked_for} and for a .txt beside each image; "
        "name another one with --captions"
    )


def read_file(path: Path, gathered: CaptionCollector) -> str:
    """Read one file of any layout, or a folder of images with texts; return the layout's name."""
    if path.is_dir():
        return _read_sidecars(path, gathered)
    text = _read_text(path, gathered)
    if text.lstrip().startswith(("{", "[")):
        return _read_json(path, text, gathered)
    lines = _lines(text)
    first_lines = [line for line in lines[:100] if line.strip()][:10]
    # With the tab: a CSV line may well end in "we are #1".
    if any("\t" in line and TOKEN_LINE.fullmatch(line) for line in first_lines):
        _read_token_file(path, lines, gathered)
        return "Flickr8k token file"
    columns = _read_delimited(path, lines, gathered)
    is_kaggle = path.name == "captions.txt" and columns == ["image", "caption"]
    return "Flickr8k captions.txt" if is_kaggle else "CSV"


def _read_text(path: Path, gathered: CaptionCollector) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except MemoryError as error:
        raise UserError(f"{path}: too large for this computer's memory; cut it up") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        gathered.count("file not UTF-8, read as Windows-1252", path.name)
        return content.decode("cp1252", "replace")


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\n|\r", text)  # str.splitlines() would also cut at U+2028 and others


# The layouts


def _read_sidecars(folder: Path, gathered: CaptionCollector) -> str:
    sidecars = find_sidecars(folder)
    gathered.split_source = "the names of the folders"
    # Only where both are: a folder "train" alone may well be of locomotives.
    first = {name.partition("/")[0].lower() for name in sidecars.images.values() if "/" in name}
    by_folder = {"train", "val"} <= {SPLIT_WORDS[word] for word in first & SPLIT_WORDS.keys()}
    for text, name in sidecars.images.items():
        where = text.relative_to(folder).as_posix()
        lines = [line for line in _lines(_read_text(text, gathered)) if line.strip()]
        split = name.partition("/")[0].lower() if by_folder and "/" in name else None
        gathered.add(where, name, lines, split if split in SPLIT_WORDS else None)
    for reason, texts in (
        (".txt files without an image of their name ignored", sidecars.lone),
        (".txt files whose name fits several images ignored", sidecars.ambiguous),
    ):
        for text in texts:
            gathered.count(reason, text.relative_to(folder).as_posix())
    return "folder of .txt captions"


def read_shards(shards: TarShards, gathered: CaptionCollector) -> str:
    """Read the texts beside images in tar shards; return the layout's name."""
    found = shards.read_captions()
    for name, lines in found.captions.items():
        gathered.add(name, name, lines)
    for text in found.lone:
        gathered.count(".txt files without one image of their name ignored", text)
    return "tar shards with .txt captions"


def _read_token_file(path: Path, lines: list[str], gathered: CaptionCollector) -> None:
    for number, line in enumerate(lines, 1):
        parts = TOKEN_LINE.fullmatch(line)
        if parts:
            gathered.add(f"line {number}", parts["name"], parts["caption"])
        elif line.strip():
            gathered.count(MALFORMED, f"line {number}")
    lists = {split: path.with_name(name) for split, name in FLICKR8K_LISTS.items()}
    present = [split for split in SPLITS if lists[split].is_file()]
    if len(present) == len(SPLITS):
        gathered.split_source = "Flickr_8k.*Images.txt beside the captions"
        for split in SPLITS:
            for line in _read_text(lists[split], gathered).splitlines():
                gathered.set_split(normalize_name(line.strip()), split)
    elif present:
        gathered.count("incomplete split lists beside the captions ignored")


def _read_delimited(path: Path, lines: list[str], gathered: CaptionCollector) -> list[str]:
    """Read CSV, TSV and their like; return the names of the columns."""
    start = next((index for index, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{path}: the file is empty")
    delimiter, columns, (image, caption, split) = _read_header(path, lines, start)
    gathered.split_source = "the file's own split column"
    for number, fields in _rows(lines, start + 1, delimiter, len(columns)):
        while len(fields) > len(columns) and not fields[-1].strip():
            fields.pop()
        surplus = len(fields) - len(columns)
        if surplus > 0:  # delimiters in a caption that nobody quoted
            parts = fields[caption : caption + surplus + 1]
            fields[caption : caption + surplus + 1] = [delimiter.join(parts)]
        if len(fields) <= max(image, caption):
            gathered.count(MALFORMED, f"line {number}")
            continue
        word = fields[split] if 0 <= split < len(fields) else None
        gathered.add(f"line {number}", fields[image], fields[caption], word)
    return columns


def _read_header(path: Path, lines: list[str], start: int) -> tuple[str, list[str], list[int]]:
    """Return delimiter, column names, and where image, caption and split stand (-1: nowhere)."""
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
    itself: a quote that nobody closed spoils one line, not all that follow.
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


def _read_json(path: Path, text: str, gathered: CaptionCollector) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        # An object a line is JSONL under any name; otherwise the JSON is broken.
        first_line = _lines(text.strip())[0]
        if path.suffix.lower() != ".jsonl" and not isinstance(_parse_line(first_line), dict):
            raise UserError(f"{path}: not valid JSON ({error})") from error
        return _read_jsonl(_lines(text), gathered)
    if isinstance(document, dict) and "annotations" in document:
        return _read_coco(path, document, gathered)
    if isinstance(document, dict) and "images" in document:
        return _read_karpathy(path, document, gathered)
    if path.suffix.lower() == ".json":
        raise UserError(
            f'{path}: neither "images" with "sentences" (Karpathy) nor "annotations" (COCO)'
        )
    return _read_jsonl(_lines(text), gathered)


def _read_jsonl(lines: list[str], gathered: CaptionCollector) -> str:
    gathered.split_source = "the file's own split column"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse_line(line)
        if not isinstance(record, dict):
            gathered.count(MALFORMED, f"line {number}")
            continue
        record = {key.strip().lower(): value for key, value in record.items()}
        name, captions, split = (
            next((record[alias] for alias in aliases if alias in record), None)
            for aliases in ALIASES.values()
        )
        gathered.add(f"line {number}", name, captions, split)
    return "JSONL"


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_karpathy(path: Path, document: dict[str, Any], gathered: CaptionCollector) -> str:
    images = _list_of(path, document, "images")
    if not any("sentences" in image for image in images if isinstance(image, dict)):
        raise UserError(f'{path}: no "sentences" in any of "images"; expected Karpathy\'s JSON')
    gathered.split_source = "the file's own splits"
    for number, image in enumerate(images, 1):
        where = f"image {number}"
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(sentences, list) or not isinstance(image.get("filename"), str):
            gathered.count(MALFORMED, where)
            continue
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if folder else image["filename"]
        captions = [item.get("raw") if isinstance(item, dict) else item for item in sentences]
        gathered.add(where, name, captions, image.get("split"))
    return "Karpathy JSON"


def _read_coco(path: Path, document: dict[str, Any], gathered: CaptionCollector) -> str:
    gathered.split_source = "the names of the captions files"
    words = set(FILE_SPLIT.findall(path.stem.lower()))
    split = words.pop() if len(words) == 1 else None
    names: dict[str, str] = {}
    for number, image in enumerate(_list_of(path, document, "images"), 1):
        where = f"{path.name}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            gathered.count(MALFORMED, where)
            continue
        names[str(image.get("id"))] = image["file_name"]
        gathered.add(where, image["file_name"], [], split)
    for number, item in enumerate(_list_of(path, document, "annotations"), 1):
        where = f"{path.name}, annotation {number}"
        if not isinstance(item, dict) or "caption" not in item:
            gathered.count(MALFORMED, where)
        elif str(item.get("image_id")) not in names:
            gathered.count("annotations of unknown images dropped", where)
        else:
            gathered.add(where, names[str(item["image_id"])], item["caption"])
    return "COCO JSON"


def _list_of(path: Path, document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise UserError(f'{path}: "{key}" is missing or not a list')
    return value
