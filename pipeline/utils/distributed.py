"""What several processes that do one job tell each other, and how they share its work.

    torchrun --nproc-per-node 4 -- extract_features.py --data photos

``torchrun`` of PyTorch starts them, and ``torchrun.joined_job`` joins them. Without it a process
is alone: rank 0 of 1, and nothing here waits or connects. What the processes tell each other is
small, so gloo carries it on CPUs and GPUs alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Item = TypeVar("Item")
Items = TypeVar("Items", bound="Sequence[Any] | Tensor")
Result = TypeVar("Result")

LOST = (
    "another process of this job ended before its work was done: see what it says; the same "
    "command goes on where this one stopped"
)
STARTED_OVER = "captioner/started over"


@dataclass(frozen=True)
class World:
    """Which of the job's processes this one is.

    Attributes:
        rank: its number, from 0; rank 0 alone reports, and writes what is of the whole job.
        size: how many there are.
        local_rank: its number among those of this machine, which chooses its GPU.
        notes: where torchrun keeps what outlives the processes that it restarts; None without it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    notes: Store | None = None

    def barrier(self) -> None:
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
        return sum(self.all_gather(value))

    def all_gather(self, value: Result) -> list[Result]:
        """Give ``value`` of every process, in the order of ranks.

        Raises:
            UserError: another process ended before it came here.
        """
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Result | None] = [None] * self.size
        with _connected():
            torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """Add up each of some numbers over all processes; quicker than ``collect``.

        Raises:
            UserError: another process ended before it came here.
        """
        if self.size == 1:
            return values
        import torch.distributed

        sums = torch.tensor(values, dtype=torch.float64)
        with _connected():
            torch.distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def broadcast(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` in rank 0 alone; every process gets what it gave.

        Raises:
            UserError: another process ended before it came here.
        """
        if self.size == 1:
            return function()
        import torch.distributed

        values = [function() if self.rank == 0 else None]
        with _connected():
            torch.distributed.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def share(self, items: Items) -> Items:
        """Give this process's share of some items: one in ``size``; there may be none for it."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """Call ``work`` for every item, each process for its share.

        Returns:
            What it gave, in the order of the items; every process gets all.

        Raises:
            UserError: another process ended before it came here.
        """
        shares = self.all_gather([work(item) for item in self.share(items)])
        return [shares[n % self.size][n // self.size] for n in range(len(items))]

    def local_main_first(self, function: Callable[[], Result]) -> Result:
        """Call ``function``, which may download something, in one process of each machine
        before the others call it.
        """
        result = function() if self.local_rank == 0 else None
        self.barrier()
        return function() if result is None else result

    def refuse_differences(self, values: Mapping[str, Any]) -> None:
        """Check that all processes go by the same values, as machines may differ.

        Raises:
            UserError: they do not; it names the first of the values that differs.
        """
        first, *others = self.all_gather(dict(values))
        for other in others:
            for name in first:
                if first[name] != other.get(name):
                    raise UserError(
                        f"the processes of this job differ in {name}: {first[name]} and "
                        f"{other.get(name)}; name it in the command, or give every machine the "
                        "same files"
                    )

    def starts_over(self, force: bool) -> bool:
        """Tell whether ``force`` still holds: not where this job has started over already, as
        torchrun gives the processes that it restarts the same options.
        """

        def still() -> bool:
            if self.notes is None or not force:
                return force
            # Where the notes do not outlive a restart, rather too little is discarded.
            lasting = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            first = lasting or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            return first and not self.notes.check([STARTED_OVER])

        return self.broadcast(still)

    def note_started_over(self) -> None:
        """Note that what there was is discarded, so that it happens once: see ``starts_over``."""
        if self.notes is not None and self.rank == 0:
            self.notes.set(STARTED_OVER, "")


SINGLE_PROCESS = World()


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error is that of a process whose neighbour is gone."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Say what the errors of a talk between processes mean."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(LOST) from error
