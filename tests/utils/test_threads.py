"""Working ahead in threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator

import pytest

from pipeline.utils.threads import prefetch


def test_prefetch_keeps_the_order() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number * number

    results = list(prefetch(slow_first, range(20), workers=4, ahead=6))
    assert results == [number * number for number in range(20)]
    assert list(prefetch(slow_first, [], workers=4, ahead=6)) == []


def test_prefetch_is_bounded() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    results = prefetch(str, items(), workers=2, ahead=3)
    assert drawn == []
    for taken in range(1, 20):
        next(results)
        assert len(drawn) == taken + 3


def test_prefetch_works_in_several_threads_which_start_first() -> None:
    meeting = threading.Barrier(3, timeout=10)
    started: list[int] = []
    results = prefetch(
        lambda _: meeting.wait(), range(3), workers=3, ahead=3, start=lambda: started.append(1)
    )
    assert len(list(results)) == len(started) == 3


def test_prefetch_raises_in_place() -> None:
    results = prefetch(lambda number: 1 / number, [1, 2, 0, 4], workers=2, ahead=3)
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_prefetch_closed_early_stops() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.01)
        return number

    results = prefetch(work, range(1000), workers=2, ahead=50)
    next(results)
    assert isinstance(results, Generator)
    results.close()
    count = len(started)
    assert count < 20  # the 50 that waited were cancelled
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    time.sleep(0.05)
    assert len(started) == count
