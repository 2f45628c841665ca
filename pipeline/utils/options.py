"""Options as dataclass fields: name, type, default, help and limits in one place.

The commands make click options of such fields (``cli.options.from_dataclass``). Without torch.
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
    """Return a dataclass field that is an option of a command.

    Args:
        default: None where the value is decided later; ``default_help`` says how, in words.
        help: one or two sentences for ``--help``.
        min, max: limits of a number, exclusive with ``open_min`` or ``open_max``.
        choices: the allowed values of a string.
        heading: the heading of ``--help`` that the option stands under.
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
    """Raise UserError for a name that no device has; whether it is there is not checked."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
