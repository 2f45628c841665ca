"""Exceptions for what a user can mend. Their text is one line."""

from __future__ import annotations

import click


class UserError(click.ClickException):
    """A wrong command or unusable data: names the file or option and says what to do.

    ``click`` prints it as ``Error: ...`` and ends with exit code 2; from Python it is an
    ordinary exception.
    """

    exit_code = 2


class InputError(click.ClickException):
    """One of many inputs cannot be used, and the user asked to stop there: exit code 1."""

    exit_code = 1


class ImageError(Exception):
    """A picture that cannot be read; the text is the reason, without the file's name."""
