"""Look for pictures that break the reader: no test, but a search that goes on while it is let.

    pip install atheris
    PYTHONPATH=.:tests python tests/fuzz/fuzz_pictures.py corpus/ -max_total_time=660

Begins with a small picture of every format, and keeps in the folder what reaches further into the
code. The options are libFuzzer's. Anything but a square or an ImageError ends it, as do 2 GB of
memory and 20 seconds for one picture; the picture is then left in a file beginning with ``crash-``,
``oom-`` or ``timeout-``.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_pictures import SMALL

atheris: Any = importlib.import_module("atheris")  # it is no dependency

with atheris.instrument_imports(include=["PIL", "pillow_heif", "pipeline"]):
    from PIL import Image

    from pipeline.images import IMAGE_SIZE, ImageError, read_square

    Image.init()

OPTIONS = ["-max_len=8192", "-rss_limit_mb=2048", "-timeout=20"]


@dataclass
class Stored:
    """A picture that is no file."""

    content: bytes

    def read(self) -> bytes:
        return self.content


def read(content: bytes) -> None:
    """Read a picture, or be told in one line why not."""
    try:
        assert read_square(Stored(content)).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    except ImageError as error:
        assert str(error) and "\n" not in str(error)


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, make in SMALL.items():
            (folder / kind.replace(" ", "-")).write_bytes(make())
    # Most pictures above this would only take their seconds.
    Image.MAX_IMAGE_PIXELS = 1 << 20
    atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:]], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
