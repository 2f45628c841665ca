"""Several processes that do one job together, started by PyTorch's ``torchrun``.

    torchrun --nproc-per-node 4 extract_features.py --data photos

Without ``torchrun`` a process is alone: rank 0 of 1, and nothing here waits or connects.
What the processes tell each other is small, so gloo carries it on CPUs and GPUs alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from pipeline.errors import UserError

Result = TypeVar("Result")

# One process may finish its share long before another. A process that dies is noticed at
# once all the same: its connections close, and torchrun ends the others.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Job:
    """Which of the job's processes this one is.

    Attributes:
        rank: its number, from 0; rank 0 alone reports.
        size: how many there are.
        local_rank: its number among those of this machine, which chooses its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def wait_for_all(self) -> None:
        """Return when every process has come here.

        Raises:
            UserError: another process ended before.
        """
        self.total(0)

    def total(self, value: int) -> int:
        """Add up ``value`` over all processes; every one gets the sum.

        Raises:
            UserError: another process ended before it came here.
        """
        return sum(self.collect(value))

    def collect(self, value: Result) -> list[Result]:
        """Give ``value`` of every process, in the order of ranks.

        Raises:
            UserError: another process ended before it came here.
        """
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Result | None] = [None] * self.size
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise UserError(
                "another process of this job ended before its work was done: see what it says; "
                "the same command goes on where this one stopped"
            ) from error
        return values  # type: ignore[return-value]

    def one_a_machine_first(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, which may download something, in one process of each machine
        before the others call it.
        """
        result = function() if self.local_rank == 0 else None
        self.wait_for_all()
        return function() if result is None else result


@contextlib.contextmanager
def joined_job() -> Iterator[Job]:
    """Join the job that ``torchrun`` started this process for, if it did.

    Raises:
        UserError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job()
        return
    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "WORLD_SIZE is set, but the job's other processes cannot be joined "
            f"({str(error).splitlines()[0]}); start it with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield Job(
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
            int(os.environ.get("LOCAL_RANK", "0")),
        )
    finally:
        torch.distributed.destroy_process_group()
