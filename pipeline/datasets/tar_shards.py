"""Images in tar shards, as WebDataset lays them out, read in place: nothing is unpacked.

    --data 'shards/{0000..0099}.tar'                       # a hundred files
    --data 'shards/*.tar'                                  # all that there are
    --data 's3://bucket/shards/{0000..0099}.tar'           # wherever fsspec can read
    --data 'simplecache::https://host/{0000..0099}.tar'    # each fetched once, to a temporary file

The members of a shard are listed at the start, header by header, and an image is then read by
its offset and size alone. So images can be read in any order, and extraction goes on in the
middle of a shard. An image is called by its shard and its member, ``0000.tar/000017.jpg``.

A text beside an image in the shard, ``000017.txt``, has its captions, one a line. What comes
before the first dot of a file's name tells what belongs together.
"""

from __future__ import annotations

import bisect
import functools
import glob
import itertools
import os
import re
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.datasets.images import IMAGE_EXTENSIONS, ImageError
from pipeline.utils.errors import UserError

if TYPE_CHECKING:
    import numpy

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MOST_SHARDS = 1_000_000
# No image or text that people make is larger; a header may claim anything.
LARGEST_PICTURE, LARGEST_TEXT = 1 << 29, 1 << 20
# Tries to read an image from afar, and seconds before the second; then twice as many.
TRIES, PAUSE = 3, 1.0


@dataclass(frozen=True)
class TarMember:
    """One image in a shard.

    Attributes:
        shard: path or URL of the tar file.
        member: its name there.
        offset, size: where its bytes lie, and how many there are.
        time: when it was made, by the tar file, in ns; 0: not known.
    """

    shard: str
    member: str
    offset: int
    size: int
    time: int = 0

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    def read(self) -> bytes:
        """Read the image's bytes; from afar with some patience.

        Raises:
            ImageError: it is too large, or the shard ends before it.
            OSError: the shard cannot be read.
        """
        if self.size > LARGEST_PICTURE:
            raise ImageError(f"claims {self.size:,} bytes in its shard")
        for attempt in range(TRIES):
            try:
                content = _read_range(self.shard, self.offset, self.size)
                break
            except Exception:  # each of fsspec's file systems has errors of its own
                if not is_remote(self.shard) or attempt == TRIES - 1:
                    raise
                time.sleep(PAUSE * 2**attempt)
        if len(content) < self.size:
            raise ImageError("its shard ends before it")
        return content


@dataclass(frozen=True)
class ShardIndex:
    """What is in one shard.

    Attributes:
        members: its images, in the order of their bytes.
        places: int64 (len(members), 3): offset, size and time of each.
    """

    members: list[str]
    places: numpy.ndarray


@dataclass
class ShardCaptions:
    """The texts in shards.

    Attributes:
        captions: name of an image -> the lines of the text beside it.
        lone: texts without an image of their name, or with several.
    """

    captions: dict[str, list[str]]
    lone: list[str]


class TarShards:
    """The images of several shards. A shard is listed when something in it is first asked for.

    Attributes:
        origin: the folder of the shards, so that a cache takes further ones of the same.

    Raises:
        UserError: there are no such shards, or they are compressed.
    """

    def __init__(self, pattern: str) -> None:
        self.origin = shards_folder(pattern) + "/*.tar"
        self._shards = expand(pattern)
        self._labels = _labels(self._shards)
        self._numbers = {label: number for number, label in enumerate(self._labels)}
        self._indices: dict[int, ShardIndex] = {}

    @property
    def is_local(self) -> bool:
        """Whether an image can be read at no cost."""
        return not any(map(is_remote, self._shards))

    @property
    def captioned(self) -> TarShards:
        """What ``captions.read_captions`` reads."""
        return self

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All images, in the order of their bytes.

        Raises:
            UserError: a shard is missing, cut off or damaged.
        """
        names: list[str] = []
        for number, label in enumerate(self._listing()):
            names += [f"{label}/{member}" for member in self._index(number).members]
        return sorted(names, key=os.fsencode)

    def image(self, name: str) -> TarMember:
        """Find an image by its name.

        Raises:
            UserError: see ``names``; or there is no such image.
        """
        label, _, member = name.partition(".tar/")
        number = self._numbers.get(label + ".tar")
        if number is not None:
            index = self._index(number)
            row = bisect.bisect_left(index.members, os.fsencode(member), key=os.fsencode)
            if row < len(index.members) and index.members[row] == member:
                return TarMember(self._shards[number], member, *index.places[row].tolist())
        raise UserError(f"{name}: no such image in {self.origin}")

    def read_captions(self) -> ShardCaptions:
        """Read the texts beside the images.

        Raises:
            UserError: see ``names``.
        """
        found = ShardCaptions({}, [])
        for number, label in enumerate(self._listing()):
            texts: dict[str, list[str]] = {}
            index = self._indices[number] = _list(self._shards[number], texts)
            by_key: defaultdict[str, list[str]] = defaultdict(list)
            for member in index.members:
                by_key[_key(member)].append(member)
            for text, lines in texts.items():
                images = by_key[_key(text)]
                if len(images) == 1:
                    found.captions[f"{label}/{images[0]}"] = lines
                else:
                    found.lone.append(f"{label}/{text}")
        return found

    def _listing(self) -> Iterable[str]:
        from pipeline.utils.progress import progress_bar

        return progress_bar(self._labels, desc="listing shards", unit="shard", leave=False)

    def _index(self, number: int) -> ShardIndex:
        if number not in self._indices:
            self._indices[number] = _list(self._shards[number])
        return self._indices[number]


def is_tar_shards(data: str | os.PathLike[str]) -> bool:
    """Tell whether ``--data`` names tar files, and not a folder."""
    text = os.fspath(data)
    return text.lower().endswith((".tar", ".tar.gz", ".tgz")) and not Path(text).is_dir()


def is_remote(shard: str) -> bool:
    """Tell whether fsspec reads a shard, and not Python."""
    return "://" in shard or "::" in shard


def expand(pattern: str) -> list[str]:
    """List the shards that a pattern names.

    ``{0000..0099}`` stands for the numbers, with as many digits; ``{train,val}`` for each
    of these; ``*`` and ``?`` for what is there.

    Raises:
        UserError: there is none, or they are compressed.
    """
    if not pattern.lower().endswith(".tar"):
        raise UserError(f"--data {pattern}: compressed shards cannot be read in place; unpack them")
    shards = []
    for text in itertools.islice(_expanded(pattern), MOST_SHARDS + 1):
        shards += sorted(_glob(text)) if re.search(r"[*?]", text) else [text]
    if len(shards) > MOST_SHARDS:
        raise UserError(f"--data {pattern}: names more than {MOST_SHARDS:,} shards")
    if not shards:
        raise UserError(f"--data {pattern}: no such shards")
    return list(dict.fromkeys(shards))


def _expanded(pattern: str) -> Iterator[str]:
    if found := RANGE.search(pattern):
        first, last = found.groups()
        width = len(first) if first.startswith("0") else 0
        values: Iterator[str] = (f"{n:0{width}d}" for n in range(int(first), int(last) + 1))
    elif found := CHOICE.search(pattern):
        values = iter(found[1].split(","))
    else:
        yield pattern
        return
    for value in values:
        yield from _expanded(pattern[: found.start()] + value + pattern[found.end() :])


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        # Path.glob takes no pattern from the root.
        return glob.glob(pattern)  # noqa: PTH207
    system, path = _file_system(pattern)
    return [system.unstrip_protocol(found) for found in system.glob(path)]


def shards_folder(pattern: str) -> str:
    """Give what comes before the first name in a pattern that stands for several."""
    fixed = re.split(r"[{*?]", pattern)[0].replace("\\", "/").rpartition("/")[0]
    # Not resolve(), which would take the name of what a symbolic link points to.
    return fixed if is_remote(pattern) else os.path.abspath(fixed)  # noqa: PTH100


def _labels(shards: Sequence[str]) -> list[str]:
    """Name shards by their files' names, with as much of their paths as tells them apart."""
    parts = [shard.replace("\\", "/").split("/") for shard in shards]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _key(member: str) -> str:
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _list(shard: str, texts: dict[str, list[str]] | None = None) -> ShardIndex:
    """List the images of a tar file; into ``texts``, if given, go the lines of its texts.

    Raises:
        UserError: the file is missing, cut off or damaged.
    """
    import numpy

    found: dict[str, tuple[int, int, int]] = {}
    try:
        with _opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                name = member.name.removeprefix("./")
                suffix = PurePosixPath(name).suffix.lower()
                hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
                # Links, devices and files with holes have no bytes of their own in one place.
                if hidden or not member.isreg() or member.sparse:
                    continue
                if suffix in IMAGE_EXTENSIONS:
                    # A header may claim any time.
                    time_ns = round(member.mtime * 1e9) if 0 < member.mtime < 1 << 33 else 0
                    found[name] = (member.offset_data, member.size, time_ns)
                elif texts is not None and suffix == ".txt" and member.size <= LARGEST_TEXT:
                    file.seek(member.offset_data)
                    text = file.read(member.size).decode("utf-8-sig", "replace")
                    texts[name] = [t for t in re.split(r"\r\n|\n|\r", text) if t.strip()]
            # Behind the last file there are zeros; tarfile takes anything else for the end, too.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{shard}: damaged, cut off or no tar file ({error}); get or make it again"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{shard}: no such shard") from error
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{shard}: cannot be read ({' '.join(reason.split())})") from error
    members = sorted(found, key=os.fsencode)
    places = numpy.array([found[m] for m in members], dtype=numpy.int64).reshape(-1, 3)
    return ShardIndex(members, places)


def _opened(shard: str) -> BinaryIO:
    if not is_remote(shard):
        return Path(shard).open("rb")
    system, path = _file_system(shard)
    file: BinaryIO = system.open(path, "rb")
    return file


def _read_range(shard: str, offset: int, size: int) -> bytes:
    if not is_remote(shard):
        with Path(shard).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    system, path = _file_system(shard)
    content: bytes = system.cat_file(path, start=offset, end=offset + size)
    return content


def _file_system(url: str) -> tuple[Any, str]:
    """Find fsspec's file system of a URL, of which it keeps one, and the path there."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # of fsspec itself, or of what it needs for this
        raise UserError(f"--data {url}: {error}") from error
    return system, path
