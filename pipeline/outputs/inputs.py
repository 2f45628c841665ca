"""The images that a command line names: files, folders, patterns, or a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.images import IMAGE_EXTENSIONS, find_images
from pipeline.utils.errors import UserError

STANDARD_INPUT = "-"


def collect(arguments: tuple[str, ...]) -> list[str]:
    """Turn files, folders, patterns and ``-`` into a list of paths, each once, in their order.

    Raises:
        UserError: an argument names nothing, or no image.
    """
    paths: dict[str, None] = {}
    for argument in arguments:
        if argument == STANDARD_INPUT:
            found = list(_listed(sys.stdin.buffer.read()))
        elif Path(argument).is_file():
            found = [argument]  # whatever its name says
        else:
            # The shell expands patterns, but not on Windows and not in quotes.
            pattern = glob.escape(argument) if Path(argument).is_dir() else argument
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - also absolute
            found = []
            for path in map(Path, matches):
                if path.is_dir():
                    found += [str(path / name) for name in find_images(path)]
                elif path.suffix.lower() in IMAGE_EXTENSIONS:
                    found.append(str(path))
            if not matches:
                raise UserError(f"{argument}: no such file, folder or pattern")
        if not found:
            name = "standard input" if argument == STANDARD_INPUT else argument
            raise UserError(f"{name}: no images there")
        paths.update(dict.fromkeys(found))
    return list(paths)


def _listed(content: bytes) -> Iterator[str]:
    """Yield the paths of a list: one per line, or ended by NUL as ``find -print0`` has them.

    A path that is not there is kept, to be named among the failures.
    """
    for line in content.split(b"\0" if b"\0" in content else b"\n"):
        path = os.fsdecode(line if b"\0" in content else line.removesuffix(b"\r"))
        if Path(path).is_dir() and path:
            yield from (str(Path(path) / name) for name in find_images(Path(path)))
        elif path.strip():
            yield path
