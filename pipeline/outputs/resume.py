"""What an interrupted caption.py has done already, so that the same command goes on.

While captions are made for a file that is written whole at its end, a journal lies beside it: a
first line that says by what model and search, then a line of JSON an image. An image that has
changed since, by its size or time, is captioned again; so are all where the model or the search is
another. When the file is there, the journal goes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pipeline.captioner import Prediction
from pipeline.decoding.captions import Caption, Word
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable


def journal_path(target: Path) -> Path:
    """Name the journal of a file that is being made."""
    return target.with_name(f".{target.name}.journal")


class Journal(Mapping[str, Prediction]):
    """The captions made so far for one file, by image, as it was given.

    They stay in the file, and memory holds where: they are many times as large as the names.
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        """Find what an earlier run left for ``target``, and open it to be gone on with.

        Raises:
            UserError: the journal cannot be written there.
        """
        self.path = journal_path(target)
        self._places: dict[str, int] = {}  # the byte where an image's line begins
        check_writable(self.path)
        header = json.dumps(settings, sort_keys=True)
        usable = self._find_lines(header)
        try:
            self._handle: IO[bytes] = self.path.open("r+b" if usable else "w+b")
            self._handle.truncate(usable)  # what a kill cut off
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        if not usable:
            self._write(header)

    def _find_lines(self, header: str) -> int:
        """Find the lines of images that are as they were; gives up to where lines are whole."""
        place = 0
        with contextlib.suppress(OSError), self.path.open("rb") as handle:
            for line in handle:
                if not line.endswith(b"\n") or (not place and line != f"{header}\n".encode()):
                    break
                if place and (path := _unchanged(line)) is not None:
                    self._places[path] = place
                place += len(line)
        return place

    def __getitem__(self, path: str) -> Prediction:
        """Read what was noted of an image."""
        self._handle.seek(self._places[path])
        return _parse(self._handle.readline())[0]

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, prediction: Prediction) -> None:
        """Note an image that could be captioned."""
        try:
            state = _state(prediction.path)
        except OSError:
            state = None  # gone already: a resumed run has nothing to compare with
        captions = [
            [c.text, c.log_probability, [[word.text, word.probability] for word in c.words]]
            for c in prediction.captions
        ]
        line = json.dumps([prediction.path, state, captions])
        self._places[prediction.path] = self._write(line)

    def _write(self, line: str) -> int:
        """Add a line; gives the byte where it begins."""
        try:
            place = self._handle.seek(0, os.SEEK_END)
            self._handle.write(f"{line}\n".encode())
            self._handle.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        return place

    def finish(self) -> None:
        """Remove the journal: what it was for is there."""
        self._handle.close()
        self.path.unlink(missing_ok=True)


def _state(path: str) -> list[int]:
    """Give what tells that an image is still the same: size in bytes and time in ns."""
    information = Path(path).stat()
    return [information.st_size, information.st_mtime_ns]


def _parse(line: bytes) -> tuple[Prediction, Any]:
    """Read a line: what was made of an image, and what the image was then."""
    path, state, captions = json.loads(line)
    made = [
        Caption(text, score, tuple(Word(word, chance) for word, chance in words))
        for text, score, words in captions
    ]
    return Prediction(path, made), state


def _unchanged(line: bytes) -> str | None:
    """Give the image of a line, if it is one and the image is as it was then."""
    try:
        prediction, state = _parse(line)
        return prediction.path if state == _state(prediction.path) else None
    except (OSError, ValueError, TypeError):
        return None
