"""Where the pictures of a data set are: in a folder, or in tar shards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.images import find_images
from pipeline.tar_shards import TarShards, is_tar_shards

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class PictureFolder:
    """The pictures below a folder.

    Attributes:
        folder: which one.
    """

    folder: Path

    @property
    def is_near(self) -> bool:
        """Whether a picture can be read at no cost."""
        return True

    @property
    def captioned(self) -> Path:
        """What ``captions.read_captions`` reads."""
        return self.folder

    @property
    def origin(self) -> str:
        """What a cache remembers of where its pictures are from."""
        return str(self.folder.resolve())

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All pictures, see ``images.find_images``."""
        return find_images(self.folder)

    def picture(self, name: str) -> Path:
        """Find a picture by its name."""
        return self.folder / name


PictureSource: TypeAlias = PictureFolder | TarShards


def open_source(data: str | Path) -> PictureSource:
    """Open what ``--data`` names; the pictures of a folder are not yet looked for.

    Raises:
        UserError: shards are missing or damaged.
    """
    return TarShards(str(data)) if is_tar_shards(data) else PictureFolder(Path(data))


def stamps_of(source: PictureSource, names: Sequence[str]) -> numpy.ndarray:
    """Give what tells that pictures are still the same: their sizes in bytes and times in ns.

    Those in shards have the times in the tar file, which a copy of it has, too. Of a picture that
    is not to be had both are 0.

    Returns:
        int64 (len(names), 2).
    """
    import numpy

    stamps = numpy.zeros((len(names), 2), dtype=numpy.int64)
    for row, name in enumerate(names):
        picture = source.picture(name)
        if isinstance(picture, Path):
            with contextlib.suppress(OSError):
                information = picture.stat()
                stamps[row] = information.st_size, information.st_mtime_ns
        else:
            stamps[row] = picture.size, picture.time
    return stamps
