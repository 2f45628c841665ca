"""Resuming an interrupted caption.py: the captions so far, kept next to their output file.

``.NAME.partial.jsonl`` starts with a line of search settings, followed by a JSON record per
image (``formats.as_record``) with the image's path, size and modification time. A run with other
settings starts over; an image that has changed, or could not be read, is captioned again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.captioner import Prediction
from pipeline.outputs.formats import as_record, from_record
from pipeline.utils.files import cannot_be_written, check_writable, is_special


def results_path(target: Path) -> Path:
    """Return the path of the records for an output file."""
    if is_special(target):  # leave /dev alone
        return Path(tempfile.gettempdir()) / f".captions-{os.getpid()}.partial.jsonl"
    return target.with_name(f".{target.name}.partial.jsonl")


class PartialResults:
    """Predictions by image path, kept in a file; memory holds only their offsets.

    A context manager: it removes the file when the block ends without an exception.
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        """Open the records of ``target``, including those left by an interrupted run.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = results_path(target)
        self._offsets: dict[str, int] = {}
        check_writable(self.path)
        header = json.dumps(settings, sort_keys=True).encode() + b"\n"
        try:
            self._handle: IO[bytes] = self.path.open("a+b")
            complete = self._index(header)
            self._handle.truncate(complete)  # a kill may have cut off the last line
            if not complete:
                self._handle.write(header)
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def _index(self, header: bytes) -> int:
        """Index the usable records; return the length of the intact lines in bytes."""
        offset = 0
        self._handle.seek(0)
        # If a line is damaged in any way, it and all later ones are made again.
        with contextlib.suppress(ValueError, LookupError, TypeError):
            for line in self._handle:
                if not line.endswith(b"\n") or (offset == 0 and line != header):
                    break
                if offset:
                    record = json.loads(line)
                    if "error" not in record and record["state"] == _state(record["path"]):
                        self._offsets[record["path"]] = offset
                offset += len(line)
        return offset

    def __contains__(self, path: str) -> bool:
        return path in self._offsets

    def __getitem__(self, path: str) -> Prediction:
        """Return the prediction of an image."""
        self._handle.seek(self._offsets[path])
        return from_record({**json.loads(self._handle.readline()), "image": path})

    def recorded(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Pass predictions on, adding those not yet recorded."""
        for prediction in predictions:
            if prediction.path not in self:
                self.append(prediction)
            yield prediction

    def append(self, prediction: Prediction) -> None:
        """Add a prediction; call it after writing the caption into the image, if that is wanted.

        Raises:
            UserError: the file cannot be written.
        """
        path = prediction.path
        record = {"path": path, "state": _state(path), **as_record(prediction)}
        try:
            self._offsets[path] = self._handle.seek(0, os.SEEK_END)
            self._handle.write(json.dumps(record).encode() + b"\n")
            self._handle.flush()
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def __enter__(self) -> PartialResults:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # from data that did not fit on a full disk
            self._handle.close()
        if kind is None:
            self.path.unlink(missing_ok=True)


def _state(path: str) -> list[int] | None:
    """Return size in bytes and modification time in ns, to detect a changed image."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
