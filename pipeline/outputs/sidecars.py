"""Captions in text files beside the images: photo.jpg has its own in photo.txt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.decoding.captions import Caption
from pipeline.utils.files import atomic_write


def sidecar_path(image: Path) -> Path:
    """Name the text file of an image."""
    return image.with_suffix(".txt")


def has_sidecar(image: Path) -> bool:
    """Tell whether an image has a text file with something in it."""
    try:
        return sidecar_path(image).stat().st_size > 0
    except OSError:
        return False


def write_sidecar(image: Path, captions: Sequence[Caption]) -> None:
    """Write the captions of an image beside it, one a line, best first.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(sidecar_path(image)) as handle:
        handle.writelines(f"{caption.text}\n" for caption in captions)


def shared_sidecars(images: Iterable[str]) -> dict[str, str]:
    """Find images whose text file is that of an image before them: photo.jpg, photo.png.

    Returns:
        Such an image to the one that has the file.
    """
    owners: dict[Path, str] = {}
    return {
        image: owner
        for image in images
        if (owner := owners.setdefault(sidecar_path(Path(image)), image)) != image
    }
