"""Exceptions for what a user can mend. Their text is one line."""

from __future__ import annotations

import click

from pipeline.utils.terminal import escape_control


class _OneLineError(click.ClickException):
    def format_message(self) -> str:
        """Give the text as it is shown: whatever a file's name holds, one line."""
        return escape_control(self.message)


class UserError(_OneLineError):
    """A wrong command or unusable data: names the file or option and says what to do.

    ``click`` prints it as ``Error: ...`` and ends with exit code 2; from Python it is an
    ordinary exception.
    """

    exit_code = 2


class InputError(_OneLineError):
    """One of many inputs cannot be used, and the user asked to stop there: exit code 1."""

    exit_code = 1


class ImageError(Exception):
    """An image that cannot be read; the text is the reason, without the file's name."""
