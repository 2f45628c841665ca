"""Text on its way to a terminal, which would obey what file names and captions can contain.

Escape sequences move the cursor, change the window's title or put text into the clipboard; a line
end fakes a line of its own; marks of direction make "gpj.exe" read "exe.jpg".
"""

from __future__ import annotations

import json
import re
from typing import Any

import click

# C0, DEL and C1 controls, embeddings, overrides and isolates of direction (UAX #9), and
# surrogates, which stand for bytes that are no UTF-8 and cannot be written.
BEYOND_C0 = "\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL = re.compile(f"[\x00-\x1f{BEYOND_C0}]")
# JSON escapes C0 by itself, and the line ends between its values are its own.
CONTROL_IN_JSON = re.compile(f"[{BEYOND_C0}]")


def escape_control(text: str, keep: str = "") -> str:
    r"""Write control characters, but those in ``keep``, as Python does: ``\x1b``, ``\u202e``.

    A backslash stays as it is: what has been written so is not changed by a second time.
    """
    return CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def echo(message: str, err: bool = False) -> None:
    """Print on standard output or standard error; line ends are the program's own."""
    click.echo(escape_control(message, keep="\n\t"), err=err)


def echo_failure(name: str, reason: str) -> None:
    """Print in one line what could not be read or written, and why."""
    echo(f"failed: {escape_control(name)}: {escape_control(reason)}", err=True)


def as_json(value: Any, indent: int | None = None) -> str:
    r"""Write JSON with its letters as they are and all control characters as ``\u....``."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return CONTROL_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
