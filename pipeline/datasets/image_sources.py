"""Where the images of a data set are: in a folder, or in tar shards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.datasets.images import ImageRef, find_images
from pipeline.datasets.tar_shards import TarMember, TarShards, is_remote, is_tar_shards
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder.

    Attributes:
        folder: which one.
    """

    folder: Path

    @property
    def is_local(self) -> bool:
        """Whether an image can be read at no cost."""
        return True

    @property
    def captioned(self) -> Path:
        """What ``captions.read_captions`` reads."""
        return self.folder

    @property
    def origin(self) -> str:
        """What a cache remembers of where its images are from."""
        return str(self.folder.resolve())

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All images, see ``images.find_images``."""
        return find_images(self.folder)

    def image(self, name: str) -> Path:
        """Find an image by its name."""
        return self.folder / name


ImageSource: TypeAlias = ImageFolder | TarShards


def open_source(data: str | Path) -> ImageSource:
    """Open what ``--data`` names; the images of a folder are not yet looked for.

    Raises:
        UserError: shards are missing or damaged.
    """
    return TarShards(str(data)) if is_tar_shards(data) else ImageFolder(Path(data))


def stop_if_unreachable(image: ImageRef) -> None:
    """Stop the work if an image cannot be read because a disk or a share went away.

    Then its folder is gone, or is the empty one in which the disk was. All other images would
    fail, too, and be taken for broken.

    Raises:
        UserError: it is so.
    """
    if isinstance(image, TarMember):
        lost = not is_remote(image.shard) and not Path(image.shard).is_file()
    elif isinstance(image, (str, os.PathLike)):
        try:
            with os.scandir(Path(image).parent) as entries:
                lost = next(entries, None) is None
        except OSError:
            lost = True
    else:
        lost = False
    if lost:
        raise UserError(
            f"{image}: its folder is gone or empty; when it is back, the same command goes on"
        )


def stamps_of(source: ImageSource, names: Sequence[str]) -> numpy.ndarray:
    """Give what tells that images are still the same: their sizes in bytes and times in ns.

    Those in shards have the times in the tar file, which a copy of it has, too. Of an image that
    is not to be had both are 0.

    Returns:
        int64 (len(names), 2).
    """
    import numpy

    stamps = numpy.zeros((len(names), 2), dtype=numpy.int64)
    for row, name in enumerate(names):
        image = source.image(name)
        if isinstance(image, Path):
            with contextlib.suppress(OSError):
                information = image.stat()
                stamps[row] = information.st_size, information.st_mtime_ns
        else:
            stamps[row] = image.size, image.time
    return stamps
