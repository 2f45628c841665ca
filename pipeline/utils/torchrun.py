"""Joining the other processes of a job that ``torchrun`` started: see ``distributed``.

``torchrun`` may end all processes and start them again, when one was killed or a machine comes
back. They then go on with what the files hold.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.utils.distributed import LOST, SINGLE_PROCESS, World, is_lost_connection
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

# One process may finish its share long before another. A process that dies is noticed at
# once all the same: its connections close, and torchrun ends the others.
LONGEST_WAIT = timedelta(days=30)


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Join the job that ``torchrun`` started this process for, if it did.

    Inside, rank 0 alone writes to standard output and standard error. An error that ends the
    job is shown once, by the process that met it first.

    Raises:
        UserError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE_PROCESS
        return
    import torch.distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=LONGEST_WAIT))
        meeting = _meet(torch.distributed.PrefixStore("captioner", store), rank, size)
        if size > 1:
            torch.distributed.init_process_group(
                "gloo", store=meeting, rank=rank, world_size=size, timeout=LONGEST_WAIT
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "WORLD_SIZE is set, but the job's other processes cannot be joined "
            f"({str(error).splitlines()[0]}); start it with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        with _silent() if rank else contextlib.nullcontext():
            yield World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store)
    except (Exception, KeyboardInterrupt) as error:
        # Others may have met the same error, or have lost their connection by it.
        if not _is_first_to_fail(meeting):
            raise SystemExit(getattr(error, "exit_code", 1)) from error
        shown = UserError(LOST) if is_lost_connection(error) else error
        if isinstance(shown, click.ClickException):
            shown.show()  # at once, as torchrun ends this process when another one has ended
            raise SystemExit(shown.exit_code) from error
        raise
    if size > 1:
        torch.distributed.destroy_process_group()


def _meet(store: Store, rank: int, size: int) -> Store:
    """Wait until all processes are here; gives a store that they have to themselves.

    torchrun's own store still holds what processes wrote that it has restarted since, such as
    addresses where no one listens any more. So each process hangs out a name that no one had
    before, and they have met when all have read the names of all.
    """
    from torch.distributed import PrefixStore

    store.set(f"name/{rank}", uuid.uuid4().hex)
    while True:
        names = ".".join(store.get(f"name/{other}").decode() for other in range(size))
        store.set(f"{names}/{rank}", "")
        if store.check([f"{names}/{other}" for other in range(size)]):
            return PrefixStore(names, store)
        time.sleep(0.02)


def _is_first_to_fail(store: Store) -> bool:
    """Tell whether no other process has failed before; true where that cannot be known."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:
        return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what is written to standard output and standard error."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield
