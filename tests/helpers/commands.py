"""The commands, run in this process."""

from __future__ import annotations

from typing import Any

import click
from click.testing import CliRunner, Result


def invoke(command: click.Command, *words: object, code: int = 0, **options: Any) -> Result:
    """Run a command, which must end with this exit code; ``options`` are click's ``invoke``'s."""
    result = CliRunner().invoke(command, [str(word) for word in words], **options)
    assert result.exit_code == code, result.output
    return result
