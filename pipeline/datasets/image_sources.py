"""Where the images of a data set are: in a folder, or in tar shards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.datasets.find_images import find_images
from pipeline.datasets.images import ImageRef
from pipeline.datasets.tar_shards import TarMember, TarShards, is_remote, is_tar_shards
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class ImageFolder:
    """The images below ``folder``; the same interface as ``TarShards``."""

    folder: Path
    # What ``names`` leaves out, by kind.
    skipped: Counter[str] = field(default_factory=Counter, compare=False)
    is_local = True

    @property
    def origin(self) -> str:
        """Where the images come from, as stored in a cache."""
        return str(self.folder.resolve())

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All image names, in byte order."""
        return find_images(self.folder, self.skipped)

    def image(self, name: str) -> Path:
        """Return the path of an image."""
        return self.folder / name


ImageSource: TypeAlias = ImageFolder | TarShards


def open_source(data: str | Path) -> ImageSource:
    """Open what ``--data`` names, without listing images; UserError if there are no such shards."""
    return TarShards(str(data)) if is_tar_shards(data) else ImageFolder(Path(data))


def stop_if_unreachable(image: ImageRef) -> None:
    """Raise UserError if an image cannot be read because its disk or network share is gone.

    Its folder is then missing, or an empty mount point. All other images would fail too, and
    be recorded as broken.
    """
    lost = False
    if isinstance(image, TarMember):
        lost = not is_remote(image.shard) and not Path(image.shard).is_file()
    elif isinstance(image, Path):
        try:
            with os.scandir(image.parent) as entries:
                lost = not any(entries)
        except OSError:
            lost = True
    if lost:
        raise UserError(
            f"{image}: its folder is gone or empty; reconnect it and run the same command to resume"
        )


def stamps_of(source: ImageSource, names: Sequence[str]) -> numpy.ndarray:
    """Return each image's size in bytes and modification time in ns: int64 (len(names), 2).

    An image in a shard has the time stored in the tar file, which copying preserves. Both are 0
    for a missing image.
    """
    import numpy

    stamps = numpy.zeros((len(names), 2), dtype=numpy.int64)
    for row, name in enumerate(names):
        image = source.image(name)
        if isinstance(image, Path):
            with contextlib.suppress(OSError):
                status = image.stat()
                stamps[row] = status.st_size, status.st_mtime_ns
        else:
            stamps[row] = image.size, image.time
    return stamps
