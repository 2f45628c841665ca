"""One process at a time: on a feature cache, a run folder, a file of captions.

A lock belongs to an open file (``flock``; on Windows ``msvcrt.locking``), and the operating system
takes it back when its process ends, however that ends. That the file ``.NAME.lock`` is there
means nothing: one that a killed process left is used by the next, which removes it.

Where the file system knows no locks, or the folder cannot be written, all goes on without one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError

BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    # Of a byte that no file reaches: what is locked, others cannot read.
    PLACE = 1 << 30

    def _lock(handle: IO[Any], shared: bool) -> None:
        if not shared:  # there is no such kind
            handle.seek(PLACE)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: IO[Any], shared: bool) -> None:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def take_lock(handle: IO[Any], shared: bool = False) -> bool:
    """Lock an open file until it is closed, if no other process has it locked.

    Args:
        handle: the file; one open for writing, as some network file systems want it.
        shared: together with other processes that do so too.

    Returns:
        Whether that could be: also True where the file system knows no locks.
    """
    try:
        _lock(handle, shared)
    except OSError as error:
        return error.errno not in BUSY
    return True


def is_at(handle: IO[Any], path: Path) -> bool:
    """Tell whether an open file still has the name ``path``: it may have moved or gone."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except OSError:
        return False


def lock_path(path: Path) -> Path:
    """Name the file whose lock is that of ``path``, a file or a folder; it lies beside it."""
    real = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return real.with_name(f".{real.name}.lock")


@contextlib.contextmanager
def locked(path: Path, world: World | None = None) -> Iterator[None]:
    """Keep other processes off what is at ``path``, or will be, while the block runs.

    Args:
        path: a file or a folder that this process is about to write.
        job: whose processes work on it together; each has to come here. Without one, of several
            that ``torchrun`` started the first alone has the lock.

    Raises:
        UserError: another process is at work on it.
    """
    if world is None and os.environ.get("RANK", "0") != "0":
        yield
        return
    world = world or World()
    file = lock_path(path)
    with contextlib.ExitStack() as stack:
        handle: IO[str] | None = None
        free = True
        if world.rank == 0:
            handle, free = _take(file, stack, shared=False)
            if handle is not None and free and world.size > 1:
                free = take_lock(handle, shared=True)
        # The others come when the first has found that no one else is there.
        if all(world.all_gather(free)) and world.rank > 0:
            handle, free = _take(file, stack, shared=True)
        if not all(world.all_gather(free)):
            raise UserError(
                f"{path}: another process is at work on it{_holder(file)}; wait until it has "
                "ended, or write elsewhere"
            )
        if handle is not None and world.rank == 0:
            _sign(handle)
        try:
            yield
        finally:
            if handle is not None:
                _remove(file, handle)


def _take(file: Path, stack: contextlib.ExitStack, shared: bool) -> tuple[IO[str] | None, bool]:
    """Open and lock a lock's file; gives it, if it can be had, and whether it was free."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a+", encoding="utf-8")
        except OSError:
            return None, True
        if not take_lock(handle, shared):
            handle.close()
            return None, False
        if is_at(handle, file):
            return stack.enter_context(handle), True
        handle.close()  # its last owner has removed it in the meantime


def _remove(file: Path, handle: IO[str]) -> None:
    """Delete a lock's file, unless others of this job have it open still."""
    if sys.platform == "win32":
        handle.close()  # what is open cannot be deleted there
    elif not take_lock(handle) or not is_at(handle, file):
        return
    with contextlib.suppress(OSError):
        file.unlink()


def _sign(handle: IO[str]) -> None:
    """Write down who has the lock, for the message of those who come later."""
    with contextlib.suppress(OSError):
        handle.truncate(0)
        # Past the buffer: what a full disk leaves in it would fail again when the file is closed.
        os.write(handle.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())


def _holder(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f" ({text})" if text else ""
