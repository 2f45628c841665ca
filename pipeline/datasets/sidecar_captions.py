"""Captions in text files beside their images: ``photo.jpg`` and ``photo.txt``.

Each line of the text that is not empty is a caption. ``photo.jpg.txt`` will do too, and tells apart
``photo.jpg`` and ``photo.png``. A text without an image of its name, such as README.txt, holds no
captions.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.datasets.images import find_images


@dataclass
class Sidecars:
    """The text files beside images.

    Attributes:
        images: text file -> its image's path relative to the folder, in order.
        lone: text files without an image of their name.
        ambiguous: text files whose name fits several images.
    """

    images: dict[Path, str] = field(default_factory=dict)
    lone: list[Path] = field(default_factory=list)
    ambiguous: list[Path] = field(default_factory=list)


def find_sidecars(folder: Path) -> Sidecars:
    """Find the text files beside the images of a folder and its sub-folders.

    Folders without any image are not looked into.
    """
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in find_images(folder):
        by_folder[name.rpartition("/")[0]].append(name)
    found = Sidecars()
    for parent, names in sorted(by_folder.items()):
        by_name = {_composed(Path(name).name): name for name in names}
        by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            by_stem[_composed(Path(name).stem)].append(name)
        for text in sorted((folder / parent).iterdir()):
            if text.suffix.lower() != ".txt" or text.name.startswith(".") or not text.is_file():
                continue
            stem = _composed(text.stem)
            fitting = [by_name[stem]] if stem in by_name else by_stem[stem]
            if len(fitting) == 1:
                found.images[text] = fitting[0]
            else:
                (found.ambiguous if fitting else found.lone).append(text)
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
