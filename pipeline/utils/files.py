"""Write files: no half-written file has its final name, and one process writes at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

# File types, by their first bytes.
TEXT = re.compile(rb"[^\0]*\Z")
HDF5 = re.compile(rb"\x89HDF\r\n\x1a\n")
SAFETENSORS = re.compile(rb".{7}\0\{", re.DOTALL)  # an 8-byte length, then JSON
PAGE = re.compile(rb'(?:.*\n){4}<meta name="generator" content="captioner">')
SCORES = re.compile(rb'\{\s*"predictions":')
# Output of caption.py and evaluate.py, as opposed to users' own captions in the same formats:
# JSON, JSON Lines, COCO results, CSV (perhaps saved by a spreadsheet), lines of path, tab, caption.
PREDICTIONS = re.compile(
    rb"""
    \[\]
    | (?:\[\s*)?\{\s*"image":\s*"(?:[^"\\]|\\.)*",\s*"(?:captions":\s*\[|error":)
    | \[\r?\n\ +\{\r?\n\ +"image_id":
    | (?:\xef\xbb\xbf)?"?image"?[,;]"?rank"?[,;]
    | (?P<lines>[^\t\n\0]+\t)
    """,
    re.VERBOSE,
)


def temporary_path(path: Path) -> Path:
    """Return the name of a file while it is being written; the next write replaces leftovers."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; rename it to ``path`` if the block succeeds.

    ``mode`` is ``"w"`` (UTF-8 text, ``\\n`` line ends) or ``"wb"``. Missing folders are created.
    A symbolic link is kept and its target replaced; an existing file keeps its permissions. After
    an error in the block, the temporary file is removed and ``path`` is unchanged. A device or
    pipe, such as /dev/null, is written directly.

    Raises:
        UserError: the file cannot be written; the message names it in one line.
    """
    path = Path(path)
    check_writable(path)
    target = path.resolve()
    temporary = temporary_path(target)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if is_special(target):
        try:
            with target.open(mode, **text) as handle:  # type: ignore[call-overload]
                yield handle
        except OSError as error:
            raise cannot_be_written(path, error) from error
        return
    mine: os.stat_result | None = None
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open(mode.replace("w", "x"), **text) as handle:  # type: ignore[call-overload]
            mine = os.fstat(handle.fileno())
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if not _is_at(temporary, mine):
            raise OSError(errno.EBUSY, "another process is writing it, too")
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException as error:
        if mine is not None and _is_at(temporary, mine):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_be_written(path, error) from error
        raise


def is_special(path: Path) -> bool:
    """True if ``path`` is a device, pipe or socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_at(path: Path, file: os.stat_result) -> bool:
    """True if ``path`` is still this file, not one that another process put there."""
    return path.exists() and os.path.samestat(path.stat(), file)


def cannot_be_written(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error})")


def check_writable(path: Path) -> None:
    """Create the parent folder of a file to be written.

    Raises:
        UserError: ``path`` is a folder, or its parent folder cannot be created.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror or error})") from error


def check_replaceable(path: Path, kind: re.Pattern[bytes] = TEXT) -> None:
    """Check that any file at ``path`` is of the kind about to be written there.

    A missing or empty file always passes.

    Raises:
        UserError: it is something else, such as an image, a checkpoint or the user's own captions.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as handle:
            start = handle.read(4096)
    except OSError as error:
        raise cannot_be_written(path, error) from error
    found = kind.match(start)
    if found and found.groupdict().get("lines"):
        # The user's own captions can look like this too, but name images relative to their folder.
        images = re.findall(rb"^([^\t\n\0]+)\t", start, re.MULTILINE)
        found = found if any(Path(os.fsdecode(image)).exists() for image in images) else None
    if start and not found:
        raise UserError(f"{path}: holds something else and is not replaced; name another file")


def lock_path(path: Path) -> Path:
    """Return the lock file of a file or folder, which is beside it."""
    real = path.resolve()
    return real.with_name(f".{real.name}.lock")


@contextmanager
def locked(path: Path, world: World = SINGLE_PROCESS) -> Iterator[None]:
    """Hold the lock on a file or folder to be written while the block runs.

    The operating system releases the lock when the process ends, however it ends; a leftover lock
    file is harmless. Nothing is locked if locks are unsupported or the folder is not writable.
    Rank 0 holds the lock for all processes of ``world``.

    Raises:
        UserError: another process holds the lock.
    """
    from filelock import FileLock  # takes 0.3 s; --help does not need it

    if is_special(path):
        yield
        return

    lock = FileLock(lock_path(path), timeout=0)
    holder = world.broadcast(lambda: _acquire(lock))
    if holder is not None:
        raise UserError(
            f"{path}: another process is at work on it{holder}; wait until it has ended, or write "
            "elsewhere"
        )
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows cannot delete an open file
                Path(lock.lock_file).unlink()
            lock.release()


def _acquire(lock: FileLock) -> str | None:
    """Acquire a lock and return None, or return who holds it."""
    file = Path(lock.lock_file)
    try:
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except TimeoutError:
        with contextlib.suppress(OSError, ValueError):
            return f" ({file.read_text(encoding='utf-8') or 'just begun'})"
        return ""
    except (OSError, NotImplementedError):
        return None  # locking is not possible there
    return None
