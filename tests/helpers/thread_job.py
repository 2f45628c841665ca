"""A job whose processes are threads, to test without the seconds that torchrun takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError


@dataclass
class Meeting:
    """Where the threads tell each other what processes would."""

    size: int
    values: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size)


@dataclass(frozen=True)
class ThreadJob(World):
    """A thread's part in the job."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_gather(self, value: Any) -> list[Any]:
        try:
            self.meeting.values[self.rank] = value
            self.meeting.barrier.wait(60)
            values = list(self.meeting.values)
            self.meeting.barrier.wait(60)
        except threading.BrokenBarrierError as error:
            raise UserError("another process of this job ended") from error
        return values

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        return tuple(map(sum, zip(*self.all_gather(values), strict=True)))

    def broadcast(self, function: Callable[[], Any]) -> Any:
        return self.all_gather(function() if self.rank == 0 else None)[0]


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Run ``work`` as each rank of a job; gives what each returned or raised."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadJob(rank, size, rank, meeting=meeting))
        except BaseException as error:
            results[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
