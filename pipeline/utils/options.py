"""Options as dataclass fields: name, type, default, help and limits in one place.

The commands make click options from such fields (``cli.options.from_dataclass``), reports read
help and defaults off them, and Python users construct the dataclass itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    open_min: bool = False,
    open_max: bool = False,
    choices: Sequence[str] | None = None,
    heading: str = "",
    default_help: str = "",
) -> Any:
    """Return a dataclass field that is an option of a command.

    Args:
        default: the value where the user gives none; None where it is decided later.
        help: one or two sentences for ``--help``.
        min, max: limits of a number, exclusive with ``open_min`` or ``open_max``.
        open_min, open_max: whether the limit itself is not allowed.
        choices: the allowed values of a string.
        heading: the heading of ``--help`` that the option stands under.
        default_help: what a default of None comes to, in words.
    """
    limits = {"min": min, "max": max, "min_open": open_min, "max_open": open_max}
    return field(
        default=default,
        metadata={
            "help": help,
            "limits": limits,
            "choices": choices,
            "heading": heading,
            "default_help": default_help,
        },
    )
