"""Images in tar shards, in WebDataset's layout, read in place: nothing is unpacked.

    --data 'shards/{0000..0099}.tar'                       # a hundred files
    --data 'shards/*.tar'                                  # all there are
    --data 's3://bucket/shards/{0000..0099}.tar'           # any file system of fsspec
    --data 'simplecache::https://host/{0000..0099}.tar'    # each fetched once, to a temporary file

The members of a shard are listed first, header by header; an image is then read by its offset
and size. It is named after its shard and member, ``0000.tar/000017.jpg``. The text file
``000017.txt`` beside it holds its captions, one per line: names agree up to the first dot.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.datasets.find_images import OTHER_ENDINGS, skipped_file, skipped_folder
from pipeline.utils.errors import ImageError, UserError

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
# Real images and text files are smaller; a header may claim anything.
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 1 << 29, 1 << 20
# Attempts to read a remote image (fsspec's HTTP does not retry), and seconds between them.
TRIES, PAUSE = 3, 2.0


@dataclass(frozen=True, slots=True)
class TarMember:
    """One image in a shard."""

    shard: str  # path or URL of the tar file
    member: str  # its name there
    offset: int  # where its bytes begin
    size: int  # in bytes
    time: int = 0  # modification time in the tar file, in ns; 0: unknown

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    def read(self) -> bytes:
        """Read the image's bytes.

        Raises:
            ImageError: it is too large, or the shard ends before it.
            OSError: the shard cannot be read; remote file systems may raise their own errors.
        """
        if self.size > MAX_IMAGE_BYTES:
            raise ImageError(f"claims {self.size:,} bytes in its shard")
        system, path = _file_system(self.shard)
        for tries_left in reversed(range(TRIES if is_remote(self.shard) else 1)):
            try:
                content: bytes = system.cat_file(path, self.offset, self.offset + self.size)
                break
            except Exception:  # each of fsspec's file systems raises its own errors
                if not tries_left:
                    raise
                time.sleep(PAUSE)
        if len(content) < self.size:
            raise ImageError("its shard ends before it")
        return content


class TarShards:
    """The images of several shards. A shard is listed on first use.

    Raises:
        UserError: there are no such shards, or they are compressed; on listing: a shard is
            missing, truncated or damaged.
    """

    def __init__(self, pattern: str) -> None:
        # The folder, so that a cache remains valid when shards are added to it.
        self.origin = shards_folder(pattern) + "/*.tar"
        shards = expand(pattern)
        self._shards = dict(zip(_labels(shards), shards, strict=True))
        self._members: dict[str, dict[str, TarMember]] = {}

    @property
    def is_local(self) -> bool:
        """True if no shard is remote."""
        return not any(map(is_remote, self._shards.values()))

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """All image names, in byte order."""
        names = [f"{shard}/{name}" for shard in self._listing() for name in self._list(shard)]
        return sorted(names, key=os.fsencode)

    def image(self, name: str) -> TarMember:
        """Find an image by its name; UserError if there is none."""
        stem, _, member = name.partition(".tar/")
        shard = stem + ".tar"
        if shard not in self._shards or member not in self._list(shard):
            raise UserError(f"{name}: no such image in {self.origin}")
        return self._members[shard][member]

    def read_captions(self) -> tuple[dict[str, bytes], list[str]]:
        """Read the text files beside the images.

        Returns image name -> content of its text file, and text files of no image or several.
        """
        captions: dict[str, bytes] = {}
        unmatched: list[str] = []
        for shard in self._listing():
            texts: dict[str, bytes] = {}
            self._members[shard] = _list_members(self._shards[shard], texts)
            by_key: defaultdict[str, list[str]] = defaultdict(list)
            for member in self._members[shard]:
                by_key[_key(member)].append(member)
            for text, content in texts.items():
                images = by_key[_key(text)]
                if len(images) == 1:
                    captions[f"{shard}/{images[0]}"] = content
                else:
                    unmatched.append(f"{shard}/{text}")
        return captions, unmatched

    def _listing(self) -> Iterable[str]:
        from pipeline.utils.progress import progress_bar

        return progress_bar([*self._shards], desc="listing shards", unit="shard", leave=False)

    def _list(self, shard: str) -> dict[str, TarMember]:
        if shard not in self._members:
            self._members[shard] = _list_members(self._shards[shard], None)
        return self._members[shard]


def is_tar_shards(data: str | os.PathLike[str]) -> bool:
    """True if ``--data`` names tar files, not a folder."""
    text = os.fspath(data)
    return text.lower().endswith((".tar", ".tar.gz", ".tgz")) and not Path(text).is_dir()


def is_remote(shard: str) -> bool:
    """True for a URL."""
    return "://" in shard or "::" in shard


def is_elsewhere(path: str) -> bool:
    r"""True for a URL or a network share, such as ``\\host\share``."""
    return is_remote(path) or path.replace("\\", "/").startswith("//")


def refuse_elsewhere(settings: Mapping[str, Any], names: Iterable[str], source: object) -> None:
    """Check the paths in the settings of a model or run, which may come from a stranger.

    Raises:
        UserError: a path is on another machine. Only the user decides what to connect to.
    """
    for name in names:
        value = settings.get(name)
        for path in map(str, value if isinstance(value, list | tuple) else [value]):
            if is_elsewhere(path):
                raise UserError(
                    f"{source}: was trained on remote data; to read them give --{name} '{path}'"
                )


def shards_folder(pattern: str) -> str:
    """Return the folder of the shards: what precedes the first name with a brace or wildcard."""
    fixed = re.split(r"[{*?]", pattern)[0].replace("\\", "/").rpartition("/")[0]
    # Not resolve(), which would return the target of a symbolic link.
    return fixed if is_remote(pattern) else os.path.abspath(fixed)  # noqa: PTH100


def expand(pattern: str) -> list[str]:
    """List the shards that a pattern matches; UserError if there are none.

    ``{0000..0099}`` expands to the numbers, zero-padded to that width; ``{train,val}`` to each of
    these; ``*`` and ``?`` match existing files.
    """
    if not pattern.lower().endswith(".tar"):
        raise UserError(f"--data {pattern}: compressed shards cannot be read in place; unpack them")
    shards: list[str] = []
    for text in _expand_braces(pattern):
        if re.search(r"[*?]", text):
            system, path = _file_system(text)
            found = sorted(system.glob(path))
            shards += map(system.unstrip_protocol, found) if is_remote(text) else found
        else:
            shards.append(text)
    if not shards:
        raise UserError(f"--data {pattern}: no such shards")
    return list(dict.fromkeys(shards))


def _expand_braces(pattern: str) -> Iterator[str]:
    found = BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, choices = found.groups()
    if choices is None:
        width = len(first) if first.startswith("0") else 0
        values = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        values = choices.split(",")
    for value in values:
        yield from _expand_braces(pattern[: found.start()] + value + pattern[found.end() :])


def _labels(shards: Sequence[str]) -> list[str]:
    """Name shards by file name, with as many parent folders as it takes to make them unique."""
    parts = [shard.replace("\\", "/").split("/") for shard in shards]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _key(member: str) -> str:
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _list_members(shard: str, texts: dict[str, bytes] | None) -> dict[str, TarMember]:
    """List the images of a tar file; its texts are added to ``texts``, if given."""
    found: dict[str, TarMember] = {}
    system, path = _file_system(shard)
    try:
        with system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                name = member.name.removeprefix("./")
                suffix = PurePosixPath(name).suffix.lower()
                *folders, file_name = name.split("/")
                reason = next(filter(None, map(skipped_folder, folders)), skipped_file(file_name))
                # Links, devices and sparse files have no contiguous bytes of their own.
                if reason not in (None, OTHER_ENDINGS) or not member.isreg() or member.sparse:
                    continue
                if reason is None:
                    # A header may claim any time.
                    time_ns = round(member.mtime * 1e9) if 0 < member.mtime < 1 << 33 else 0
                    found[name] = TarMember(shard, name, member.offset_data, member.size, time_ns)
                elif texts is not None and suffix == ".txt" and member.size <= MAX_TEXT_BYTES:
                    file.seek(member.offset_data)
                    texts[name] = file.read(member.size)
            # A tar file ends with zeros; tarfile also takes a damaged header for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset:,}")
    except tarfile.TarError as error:
        raise UserError(
            f"{shard}: damaged, cut off or no tar file ({error}); get or make it again"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{shard}: no such shard") from error
    except Exception as error:  # each of fsspec's file systems raises its own errors
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{shard}: cannot be read ({' '.join(reason.split())})") from error
    return found


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a path or URL, and the path within it."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # from fsspec or a package that it needs
        raise UserError(f"--data {url}: {error}") from error
    return system, path
