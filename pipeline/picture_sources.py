"""Where the pictures of a data set are: in a folder, or in tar shards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.errors import UserError
from pipeline.images import Picture, find_images
from pipeline.tar_shards import TarMember, TarShards, is_remote, is_tar_shards

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


def stop_if_lost(picture: Picture) -> None:
    """Stop the work if a picture cannot be read because a disk or a share went away.

    Then its folder is gone, or is the empty one in which the disk was. All other pictures would
    fail, too, and be taken for broken.

    Raises:
        UserError: it is so.
    """
    if isinstance(picture, TarMember):
        lost = not is_remote(picture.shard) and not Path(picture.shard).is_file()
    elif isinstance(picture, (str, os.PathLike)):
        try:
            with os.scandir(Path(picture).parent) as entries:
                lost = next(entries, None) is None
        except OSError:
            lost = True
    else:
        lost = False
    if lost:
        raise UserError(
            f"{picture}: its folder is gone or empty; when it is back, the same command goes on"
        )


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
