"""What an interrupted caption.py has done already, so that the same command goes on.

While captions are made for a file that is written whole at its end, a journal lies beside it: a
first line that says by what model and search, then a line of JSON a picture. A picture that has
changed since, by its size or time, is captioned again; so are all where the model or the search is
another. When the file is there, the journal goes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from pipeline.captioner import Caption, Prediction, Word
from pipeline.errors import UserError
from pipeline.files import check_writable


def journal_path(target: Path) -> Path:
    """Name the journal of a file that is being made."""
    return target.with_name(f".{target.name}.journal")


class Journal:
    """The captions made so far for one file.

    Attributes:
        known: picture, as it was given, to what an earlier run made of it.
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        """Read what an earlier run left for ``target``, and open it to be gone on with.

        Raises:
            UserError: the journal cannot be written there.
        """
        self.path = journal_path(target)
        self.known: dict[str, Prediction] = {}
        check_writable(self.path)
        header = json.dumps(settings, sort_keys=True)
        lines = self._lines()
        usable = bool(lines) and lines[0] == header
        for line in lines[1:] if usable else ():
            prediction = _read(line)
            if prediction is not None:
                self.known[prediction.path] = prediction
        try:
            self._handle: IO[str] = self.path.open("a" if usable else "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        if not usable:
            self._write(header)

    def _lines(self) -> list[str]:
        """Give the whole lines there; what a kill cut off is cut off the file, too."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return whole.decode("utf-8", "replace").splitlines()

    def add(self, prediction: Prediction) -> None:
        """Note a picture that could be captioned, unless it is gone already."""
        try:
            state = _state(prediction.path)
        except OSError:
            return  # captioned while it was there; a resumed run has nothing to compare with
        captions = [
            [c.text, c.log_probability, [[word.text, word.probability] for word in c.words]]
            for c in prediction.captions
        ]
        self._write(json.dumps([prediction.path, state, captions]))

    def _write(self, line: str) -> None:
        try:
            self._handle.write(line + "\n")
            self._handle.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def finish(self) -> None:
        """Remove the journal: what it was for is there."""
        self._handle.close()
        self.path.unlink(missing_ok=True)


def _state(path: str) -> list[int]:
    """Give what tells that a picture is still the same: size in bytes and time in ns."""
    information = Path(path).stat()
    return [information.st_size, information.st_mtime_ns]


def _read(line: str) -> Prediction | None:
    try:
        path, state, captions = json.loads(line)
        if state != _state(path):
            return None
        return Prediction(
            path,
            [
                Caption(text, score, tuple(Word(word, chance) for word, chance in words))
                for text, score, words in captions
            ],
        )
    except (OSError, ValueError, TypeError):
        return None
