"""Progress on standard error, live in a terminal and as occasional lines in a log; durations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {remaining} left"


class PlainLines:
    """Standard error for ``tqdm``, with one line per update instead of redrawing."""

    def write(self, text: str) -> None:
        """Write the visible part of an update."""
        line = text.strip()
        if line:
            with contextlib.suppress(OSError):
                sys.stderr.write(line + "\n")

    def flush(self) -> None:
        """Flush standard error."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a ``tqdm`` bar: redrawn twice a second in a terminal, else a line every 30 seconds.

    In a file or pipe, shorter work prints nothing, to keep logs readable.
    """
    if sys.stderr.isatty():
        options |= {"mininterval": 0.5, "dynamic_ncols": True}
    else:
        # With more than one iteration between updates tqdm's monitor would repeat a line.
        options |= {"mininterval": 30.0, "delay": 30.0, "miniters": 1}
        options |= {"bar_format": LINE, "file": PlainLines()}
    return tqdm(iterable, **options)


def duration(seconds: float) -> str:
    """Return a duration in words: ``0.4 s``, ``48 s``, ``12 min``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
