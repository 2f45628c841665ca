"""Worker threads that run ahead of the consumer of their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    start: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Map ``function`` over ``items`` in order, with ``workers`` threads working in advance.

    At most ``ahead`` results are queued. An exception in ``function`` is raised in place of its
    result. Every thread first calls ``start``.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch", initializer=start) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
