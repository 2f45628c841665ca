"""Multi-process jobs: ``torchrun`` starts the processes, ``joined_world`` connects them.

    torchrun --nproc-per-node 4 -- extract_features.py --data photos

Without ``torchrun`` a process is rank 0 of 1. The processes exchange little data, so they use gloo
on CPUs and GPUs alike; gradients go through NCCL (``training.data_parallel``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Item = TypeVar("Item")
Items = TypeVar("Items", bound="Sequence[Any] | Tensor")
Result = TypeVar("Result")

LOST = "another process of this job ended early: see its message; the same command resumes the work"
# One process may finish its share long before another; one that dies closes its connections.
TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """The job's processes, as seen by one of them. All methods except ``share`` are collective.

    Each collective method raises ``UserError`` if another process ended early.

    Attributes:
        rank: this process's number, from 0; only rank 0 reports and writes the job's files.
        size: number of processes.
        local_rank: this process's number on its machine; determines its GPU.
        restarted: True if torchrun restarted the processes after one of them failed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False

    def barrier(self) -> None:
        """Return when every process has called this."""
        self.all_gather(None)

    def total(self, value: int) -> int:
        """Return the sum of ``value`` over all processes."""
        return sum(self.all_gather(value))

    def all_gather(self, value: Result) -> list[Result]:
        """Return every process's ``value``, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        with _lost_connections_named():
            torch.distributed.all_gather_object(values, value)
        return values

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """Return the sum of each number over all processes; faster than ``all_gather``."""
        if self.size == 1:
            return values
        import torch.distributed

        sums = torch.tensor(values, dtype=torch.float64)
        with _lost_connections_named():
            torch.distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def broadcast(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0 only and return its result on every process."""
        if self.size == 1:
            return function()
        import torch.distributed

        values: list[Any] = [function() if self.rank == 0 else None]
        with _lost_connections_named():
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def share(self, items: Items) -> Items:
        """Return this process's share of ``items``, every ``size``-th one; it may be empty."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """Call ``work`` on every item, split among the processes; return all results in order."""
        shares = self.all_gather([work(item) for item in self.share(items)])
        return [shares[n % self.size][n // self.size] for n in range(len(items))]

    def local_main_first(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, which may download a file, in one process per machine first."""
        result = function() if self.local_rank == 0 else None
        self.barrier()
        return function() if result is None else result

    def refuse_differences(self, values: Mapping[str, Any]) -> None:
        """Raise ``UserError`` naming the first value in which the processes differ, if any."""
        first, *others = self.all_gather(dict(values))
        for other in others:
            for name, value in first.items():
                if value != other.get(name):
                    raise UserError(
                        f"the processes of this job differ in {name}: {value} and "
                        f"{other.get(name)}; set it in the command, or give every machine the "
                        "same files"
                    )


SINGLE_PROCESS = World()


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Join the other processes that ``torchrun`` started, if any.

    Inside, only rank 0 writes to standard output and standard error. An error that ends the job
    is shown once, by the first process to hit it.

    Raises:
        UserError: the other processes cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World(restarted=_restarts() > 0)
        return
    import torch.distributed

    store, world = _connect()
    try:
        with _silent() if world.rank else contextlib.nullcontext():
            yield world
    except (Exception, KeyboardInterrupt) as error:
        # Others may have hit the same error, or lost their connection because of it.
        if not _is_first_to_fail(store):
            raise SystemExit(getattr(error, "exit_code", 1)) from error
        shown = UserError(LOST) if _is_lost_connection(error) else error
        if isinstance(shown, click.ClickException):
            shown.show()  # now: torchrun kills this process once another has ended
            raise SystemExit(shown.exit_code) from error
        raise
    torch.distributed.destroy_process_group()


def _connect() -> tuple[Store, World]:
    """Connect to the other processes over gloo; return this attempt's store, and the world.

    On several machines a restart needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/scale.md).
    """
    import torch.distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's own store outlives a restart, with addresses where no process listens any more.
        attempt = torch.distributed.PrefixStore(f"attempt {_restarts()}", store)
        torch.distributed.init_process_group(
            "gloo", store=attempt, rank=rank, world_size=size, timeout=TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "WORLD_SIZE is set, but the job's other processes cannot be reached "
            f"({str(error).splitlines()[0]}); start it with torchrun, or unset WORLD_SIZE"
        ) from error
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", "0")))
    restarted = any(world.all_gather(_restarts() > 0))  # each machine counts its own
    return attempt, replace(world, restarted=restarted)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextlib.contextmanager
def _lost_connections_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(LOST) from error


def _is_first_to_fail(store: Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # there is no way to know
        return True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield
