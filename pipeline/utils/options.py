"""Options as dataclass fields: name, type, default, help and limits in one place.

The commands turn these fields into click options (``cli.options.from_dataclass``). No torch import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from pipeline.utils.errors import UserError


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
    """Return a dataclass field that defines a command-line option.

    Args:
        default: None if the value is decided later; ``default_help`` describes how.
        help: one or two sentences for ``--help``.
        min, max: limits of a number, exclusive with ``open_min`` or ``open_max``.
        choices: the allowed values of a string.
        heading: the section of ``--help`` that lists the option.
    """
    metadata = {
        "help": help,
        "limits": {"min": min, "max": max, "min_open": open_min, "max_open": open_max},
        "choices": choices,
        "heading": heading,
        "default_help": default_help,
    }
    return field(default=default, metadata=metadata)


def check_device_name(name: str) -> None:
    """Raise UserError for an invalid device name; availability is not checked."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
