"""Writing files so that a half-written one never stands under its final name."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.utils.errors import UserError
from pipeline.utils.locks import is_at, take_lock

# Seconds to wait for another process that is writing the same file.
PATIENCE = 60.0


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
        with _open_alone(temporary, mode, text) as handle:
            try:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
                if sys.platform != "win32":  # which moves no file that is open
                    temporary.replace(path)
            except BaseException:
                if sys.platform != "win32":
                    temporary.unlink(missing_ok=True)
                raise
        if sys.platform == "win32":
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if sys.platform == "win32":
            temporary.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended, if this is the main thread, which gets it."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return
    interruptions = []
    signal.signal(signal.SIGINT, lambda *_: interruptions.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interruptions:
        signal.raise_signal(signal.SIGINT)


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a file that is whole its final name.

    Raises:
        UserError: that cannot be.
    """
    try:
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _open_alone(temporary: Path, mode: str, options: dict[str, str]) -> IO[Any]:
    """Open a file to write it anew, when no other process is writing it.

    Two that wrote into one temporary file would move a mixture to the final name.

    Raises:
        OSError: it cannot be opened, or another process does not come to an end with it.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        handle: IO[Any] = open(temporary, mode, opener=_open_as_it_is, **options)  # type: ignore[call-overload]  # noqa: SIM115
        if take_lock(handle):
            if sys.platform == "win32" or is_at(handle, temporary):
                handle.truncate(0)  # now that it is ours
                return handle
        elif time.monotonic() > deadline:
            handle.close()
            raise OSError(errno.EBUSY, "another process is writing it")
        else:
            time.sleep(0.05)
        handle.close()


def _open_as_it_is(path: str, flags: int) -> int:
    """Open a file for ``open`` without emptying it."""
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


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
