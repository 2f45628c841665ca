"""Writing files so that a half-written one never stands under its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError


def temporary_path(path: Path) -> Path:
    """Give the name that a file has while it is being written.

    It is always the same, so that what a killed process left is written over by the next.
    """
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; move it there when the block ends well.

    ``mode`` is ``"w"`` (UTF-8 text, ``\\n`` line ends) or ``"wb"``. Missing folders are
    made. When the block raises, the temporary file is removed and ``path`` is left alone.

    Raises:
        UserError: the file cannot be written there; one line that names it.
    """
    path = Path(path)
    check_writable(path)
    temporary = temporary_path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with temporary.open(mode, **text) as handle:  # type: ignore[call-overload]
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of a file to be written, or say why that cannot be.

    Raises:
        UserError: ``path`` is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror or error})") from error
