"""Collects the records of all caption readers: captions, splits and ids by image name."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.datasets.text_encoding import decode_text
from pipeline.utils.errors import UserError

SPLITS = ("train", "val", "test")

# Accepted column and key names. Caption columns may be numbered or repeated.
ALIASES = {
    "image": ("image", "file", "filename", "file_name", "image_name", "path", "name", "image_id"),
    "caption": ("caption", "captions", "text", "comment", "sentence", "raw"),
    "split": ("split", "set", "subset"),
}
NUMBER = re.compile(r"[ ._-]?\d+$")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# A list in a cell, as Python and NumPy print it.
PRINTED_TEXT = r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\""
PRINTED_LIST = re.compile(rf"\s*\[\s*(?:(?:{PRINTED_TEXT})[\s,]*)+\]\s*", re.DOTALL)

# No system has longer paths. Names are compared by all their tails, and a name with a million
# slashes has a million of them.
MAX_NAME_LENGTH = 4096
# In characters, more than a page. Decoders are trained on at most 100 tokens, and Unicode
# normalization takes quadratic time on a run of accents.
MAX_CAPTION_LENGTH = 10_000


class CaptionCollector:
    """Captions, splits and ids by image name, as found by the readers, and notes on problems.

    Attributes:
        encoding: encoding of the files; for None see ``text_encoding.decode_text``.
        captions: cleaned captions by image name.
        splits: "train", "val" or "test" by image name, if a file states it.
        ids: integer ids by image name, if a file has them.
        split_sources: where the splits came from, in words.
        file_split: the split of images in the current file that state none themselves.
    """

    def __init__(self, encoding: str | None = None) -> None:
        self.encoding = encoding
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.ids: dict[str, int] = {}
        self.split_sources: dict[str, None] = {}
        self.file_split = ""
        self._folder = ""
        self._earlier: dict[str, int] = {}  # image name -> number of captions in earlier files
        self._merged: set[str] = set()  # images that are in several files
        self._contested: set[str] = set()  # images that are in two splits
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # reason -> where it occurred first

    def start_file(self, folder: str, split: str) -> None:
        """Begin a file: ``folder`` is prepended to its image names; ``split`` is their split."""
        self._folder, self.file_split = folder, split
        self._earlier = {name: len(texts) for name, texts in self.captions.items()}

    def read_text(self, path: Path) -> str:
        """Read a text file; UserError if it cannot be read or decoded."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return self.decode(content, str(path), path.name)

    def decode(self, content: bytes, path: str, where: str) -> str:
        """Decode a text file; UserError if that fails."""
        text, note = decode_text(content, path, self.encoding)
        if note:
            self.count(note, where)
        return text

    def count(self, reason: str, where: str = "") -> None:
        """Count one record that was dropped or repaired."""
        self._counts[reason] += 1
        self._first.setdefault(reason, clean(where))  # file names can contain line breaks

    def malformed(self, where: str) -> None:
        """Count one record that was dropped because of its structure."""
        self.count("malformed lines or entries dropped", where)

    def add(
        self,
        where: str,
        name: object,
        captions: object,
        split: object = None,
        image_id: object = None,
    ) -> None:
        """Add one record; ``captions`` is a string, a list of strings, or any other JSON value."""
        cleaned = ""
        if isinstance(name, str) and len(name) <= MAX_NAME_LENGTH:
            cleaned = normalize_name(_encodable(name).strip())
        if not cleaned:
            self.malformed(where)
            return
        if not cleaned.startswith(self._folder):
            cleaned = self._folder + cleaned
        texts = self.captions.setdefault(cleaned, [])
        earlier = texts[: self._earlier.get(cleaned, 0)]
        if earlier:
            self._merged.add(cleaned)
        for caption in _texts_of(captions):
            if caption is not None and not isinstance(caption, str):
                self.count("captions that are not text dropped", where)
            elif text := clean(caption or ""):
                if len(text) > MAX_CAPTION_LENGTH:
                    self.count(f"captions cut to {MAX_CAPTION_LENGTH:,} characters", where)
                    text = text[:MAX_CAPTION_LENGTH].rstrip()
                if text in earlier:
                    self.count("captions that are in an earlier file too dropped", where)
                else:
                    texts.append(text)
            else:
                self.count("empty captions dropped", where)
        if isinstance(image_id, int) and not isinstance(image_id, bool):
            self.ids[cleaned] = image_id
        if not self.set_split(cleaned, split, "the file's own split column"):
            self.set_split(cleaned, self.file_split, "the names of the captions files")

    def add_record(self, where: str, record: object) -> None:
        """Add one JSON object with keys from ``ALIASES``, in any case."""
        if not isinstance(record, dict):
            self.malformed(where)
            return
        values = [*record.values()]
        image, captions, split = find_columns(tuple(key.strip().lower() for key in record))
        found = [values[place] for place in captions]
        flat = [text for value in found for text in (value if isinstance(value, list) else [value])]
        name, word = (values[place] if place >= 0 else None for place in (image, split))
        self.add(where, name, flat, word)

    def set_split(self, name: str, word: object, source: str) -> bool:
        """Set the image's split, unless it has one; return False if ``word`` is empty."""
        word = "" if word is None else clean(str(word)).lower()
        split = SPLIT_WORDS.get(word)
        if split is not None:
            self.split_sources[source] = None
            if self.splits.setdefault(name, split) != split:
                self._contested.add(name)
        elif word:
            self.count("unknown split names ignored", f'"{word[:30]}"')
        return bool(word)

    def finish(self) -> tuple[Counter[str], dict[str, list[str]]]:
        """Return the notes, and the images that have captions."""
        found = {name: texts for name, texts in self.captions.items() if texts}
        notes: Counter[str] = Counter()
        for reason, count in self._counts.items():
            first = self._first[reason]
            notes[f"{reason} (first: {first})" if first else reason] = count
        notes["images left with no caption dropped"] = len(self.captions) - len(found)
        notes["images in two splits, kept in the first"] = len(self._contested & found.keys())
        notes["images in several captions files, merged"] = len(self._merged)
        return +notes, found  # "+" drops the zeros


@functools.lru_cache
def find_columns(names: tuple[str, ...]) -> tuple[int, list[int], int]:
    """Find the image and split columns (-1: none) and the caption columns, by ``ALIASES``."""
    image, split = (
        next((names.index(alias) for alias in ALIASES[what] if alias in names), -1)
        for what in ("image", "split")
    )
    bare = [NUMBER.sub("", name) for name in names]
    alias = next((alias for alias in ALIASES["caption"] if alias in bare), None)
    return image, [place for place, name in enumerate(bare) if name == alias], split


def _texts_of(value: object) -> list[Any]:
    """Return the captions in a cell or a JSON value, each a string unless malformed."""
    texts: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            text = next((item[key] for key in ALIASES["caption"] if item.get(key)), None)
            tokens = item.get("tokens")
            if text is None and isinstance(tokens, list):
                text = " ".join(token for token in tokens if isinstance(token, str))
            texts.append(text)
        elif isinstance(item, str) and item.lstrip().startswith("["):
            texts += _listed(item)
        else:
            texts.append(item)
    return texts


def _listed(cell: str) -> list[Any]:
    """Return the strings of a list written in a cell, or else the cell itself."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        if PRINTED_LIST.fullmatch(cell):
            texts = (one or other for one, other in re.findall(PRINTED_TEXT, cell))
            return [re.sub(r"\\(.)", _unescaped, text, flags=re.DOTALL) for text in texts]
        return [cell]
    is_list = isinstance(value, list) and all(isinstance(text, str | None) for text in value)
    return value if is_list else [cell]


def _unescaped(found: re.Match[str]) -> str:
    return " " if found[1] in "nrt" else found[1]


def clean(text: str) -> str:
    """Return a text with single spaces and without lone surrogates."""
    return " ".join(_encodable(text).split())


def _encodable(text: str) -> str:
    # JSON can hold lone surrogates, which neither UTF-8 nor a checkpoint can.
    return text.encode("utf-8", "replace").decode("utf-8")


def normalize_name(path: str) -> str:
    """Return a path in the form used to compare names."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")
