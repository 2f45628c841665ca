"""Exceptions that a user can act on, with one-line messages."""

from __future__ import annotations

import click

from pipeline.utils.terminal import escape_control


class _OneLineError(click.ClickException):
    def format_message(self) -> str:
        """Return the message on one line, with control characters in file names escaped.

        Line breaks in another library's error become spaces.
        """
        cause = str(self.__cause__ or "")
        return escape_control(self.message.replace(cause, " ".join(cause.split())))


class UserError(_OneLineError):
    """A wrong command or unusable data (exit code 2); names the file or option and the remedy."""

    exit_code = 2


class InputError(_OneLineError):
    """One of many inputs is unusable, and the user asked to stop at the first (exit code 1)."""

    exit_code = 1


class ImageError(Exception):
    """An image that cannot be read; the message is the reason, without the file name."""
