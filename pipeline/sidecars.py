"""Captions in text files beside the pictures: photo.jpg has its own in photo.txt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.captioner import Caption
from pipeline.files import atomic_write


def sidecar_path(picture: Path) -> Path:
    """Name the text file of a picture."""
    return picture.with_suffix(".txt")


def has_sidecar(picture: Path) -> bool:
    """Tell whether a picture has a text file with something in it."""
    try:
        return sidecar_path(picture).stat().st_size > 0
    except OSError:
        return False


def write_sidecar(picture: Path, captions: Sequence[Caption]) -> None:
    """Write the captions of a picture beside it, one a line, best first.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(sidecar_path(picture)) as handle:
        handle.writelines(f"{caption.text}\n" for caption in captions)


def shared_sidecars(pictures: Iterable[str]) -> dict[str, str]:
    """Find pictures whose text file is that of a picture before them: photo.jpg, photo.png.

    Returns:
        Such a picture to the one that has the file.
    """
    owners: dict[Path, str] = {}
    return {
        picture: owner
        for picture in pictures
        if (owner := owners.setdefault(sidecar_path(Path(picture)), picture)) != picture
    }
