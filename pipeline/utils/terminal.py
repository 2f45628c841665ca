"""Output to a terminal, with the control characters of file names and captions escaped.

Escape sequences move the cursor, change the window title or write to the clipboard; a line break
fakes a separate message; direction marks make "gpj.exe" read "exe.jpg".
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import click

# C0, DEL and C1 controls; direction embeddings, overrides and isolates (UAX #9); and surrogates,
# which stand for bytes that are not UTF-8 and cannot be written.
BEYOND_C0 = "\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL = re.compile(f"[\x00-\x1f{BEYOND_C0}]")
# JSON itself escapes C0 within strings; line breaks between values are part of its layout.
CONTROL_IN_JSON = re.compile(f"[{BEYOND_C0}]")


def escape_control(text: str, keep: str = "") -> str:
    r"""Escape control characters, except those in ``keep``, as Python does: ``\x1b``, ``\u202e``.

    Backslashes stay, so that escaping twice changes nothing.
    """
    return CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def echo(message: str, err: bool = False) -> None:
    """Print to standard output or standard error; line breaks and tabs are kept.

    If standard error cannot be written, the message is dropped and the work continues.
    """
    with contextlib.suppress(OSError) if err else contextlib.nullcontext():
        click.echo(escape_control(message, keep="\n\t"), err=err)


def echo_failure(name: str, reason: str) -> None:
    """Print one line to standard error: what could not be read or written, and why."""
    echo(f"failed: {escape_control(name)}: {escape_control(reason)}", err=True)


def as_json(value: Any, indent: int | None = None) -> str:
    r"""Return JSON with non-ASCII letters kept and every control character as ``\uXXXX``."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return CONTROL_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
