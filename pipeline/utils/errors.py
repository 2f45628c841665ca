"""Exceptions that a user can act on; their text is one line."""

from __future__ import annotations

import click

from pipeline.utils.terminal import escape_control


class _OneLineError(click.ClickException):
    def format_message(self) -> str:
        """Return the text with control characters of file names escaped: always one line.

        Line ends of another library's error become spaces.
        """
        cause = str(self.__cause__ or "")
        return escape_control(self.message.replace(cause, " ".join(cause.split())))


class UserError(_OneLineError):
    """A wrong command or unusable data: exit code 2; names the file or option and what to do."""

    exit_code = 2


class InputError(_OneLineError):
    """One of many inputs cannot be used, and the user asked to stop at it: exit code 1."""

    exit_code = 1


class ImageError(Exception):
    """An image that cannot be read; the text is the reason, without the file name."""
