"""Captions in text files beside the images: photo.jpg has its captions in photo.txt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.decoding.captions import Caption
from pipeline.utils.files import atomic_write


def sidecar_path(image: Path) -> Path:
    """Return the path of the text file of an image."""
    return image.with_suffix(".txt")


def has_sidecar(image: Path) -> bool:
    """True if an image has a text file that is not empty."""
    path = sidecar_path(image)
    return path.exists() and path.stat().st_size > 0


def write_sidecar(image: Path, captions: Sequence[Caption]) -> None:
    """Write the captions of an image beside it, one per line, best first.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(sidecar_path(image)) as handle:
        handle.writelines(f"{caption.text}\n" for caption in captions)


def shared_sidecars(images: Iterable[str]) -> dict[str, str]:
    """Return the images whose text file belongs to an earlier image (photo.jpg, photo.png).

    Each is mapped to the image that the file belongs to.
    """
    owners: dict[Path, str] = {}
    return {
        image: owner
        for image in images
        if (owner := owners.setdefault(sidecar_path(Path(image)), image)) != image
    }
