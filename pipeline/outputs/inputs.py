"""The images that a command line names: files, folders, patterns, or a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.datasets.find_images import find_images
from pipeline.datasets.images import IMAGE_EXTENSIONS
from pipeline.utils.errors import UserError

STANDARD_INPUT = "-"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Inputs:
    """The images to caption.

    Attributes:
        paths: the images, each once, in the order in which they were named.
        failures: folders that cannot be listed, with the reason.
        skipped: how many files and folders were left out, by kind.
    """

    paths: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def images_in(self, folder: Path) -> list[str]:
        """Return the images of a folder."""
        return [str(folder / name) for name in find_images(folder, self.skipped, self._failed)]

    def _failed(self, error: OSError) -> None:
        self.failures[str(error.filename)] = error.strerror or str(error)


def collect(arguments: Sequence[str]) -> Inputs:
    """Find the images that files, folders, patterns and ``-`` refer to.

    Raises:
        UserError: an argument matches nothing, or no image; standard input is not a list of paths.
    """
    inputs = Inputs()
    paths: dict[str, None] = {}
    for argument in arguments:
        if argument == STANDARD_INPUT:
            found = _listed(inputs)
        elif Path(argument).is_file():
            found = [argument]  # whatever its extension
        else:
            # The shell expands patterns, but not on Windows and not in quotes.
            pattern = glob.escape(argument) if Path(argument).is_dir() else argument
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - also absolute
            found = []
            for path in map(Path, matches):
                if path.is_dir():
                    found += inputs.images_in(path)
                elif path.suffix.lower() in IMAGE_EXTENSIONS:
                    found.append(str(path))
            if not matches:
                raise UserError(f"{argument}: no such file, folder or pattern")
        if not found and not inputs.failures:
            name = "standard input" if argument == STANDARD_INPUT else argument
            raise UserError(f"{name}: no images there")
        paths.update(dict.fromkeys(found))
    inputs.paths = list(paths)
    return inputs


def _listed(inputs: Inputs) -> list[str]:
    """Return the images of a list of files and folders on standard input.

    A path that does not exist is kept, to be reported as a failure.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed; name the images, or pipe a list of them")
    found: list[str] = []
    for path in _split_list(sys.stdin.buffer.read()):
        # A one-character folder such as "/" more likely comes from a damaged list.
        if len(path) > 1 and Path(path).is_dir():
            found += inputs.images_in(Path(path))
        else:
            found.append(path)
    return found


def _split_list(content: bytes) -> list[str]:
    """Return the paths of a list: one per line, or NUL-terminated as by ``find -print0``.

    Lines are UTF-8, with or without byte-order mark, or UTF-16 with one, as PowerShell writes.

    Raises:
        UserError: it is UTF-16 without a byte-order mark, or not text.
    """
    if content.startswith(UTF16_MARKS):
        try:
            lines = content.decode("utf-16").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: damaged UTF-16 ({error.reason})") from error
    elif b"\0" in content:
        lines = [os.fsdecode(part) for part in content.split(b"\0")]
        # In UTF-16, every other byte of Latin text is NUL.
        if not content.endswith(b"\0") or max(map(len, lines)) == 1:
            raise UserError(
                "standard input: not a list of paths; it must be UTF-8, or UTF-16 with a "
                "byte-order mark, one path per line, or paths that each end in NUL"
            )
    else:
        content = content.removeprefix(b"\xef\xbb\xbf")
        lines = [os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n")]
    return [line for line in lines if line.strip()]
