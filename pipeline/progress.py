"""Progress bars on standard error: live in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Make a ``tqdm`` bar that suits where standard error goes.

    In a terminal it is redrawn twice a second; in a file or a pipe it prints a state every
    30 seconds, and nothing at all for what takes less, so that logs stay readable.
    """
    terminal = sys.stderr.isatty()
    options |= {"mininterval": 0.5} if terminal else {"mininterval": 30.0, "delay": 30.0}
    return tqdm(iterable, dynamic_ncols=True, **options)
