"""Fetch Flickr8k: large files over a poor network, checked, and unpacked with care.

>>> from pipeline.datasets.flickr8k import download_flickr8k
>>> download_flickr8k(Path("data/flickr8k"))

Stopped in the middle (Ctrl-C, a lost network, a full disk), the same call continues where
it stopped; called once more on a complete folder it says so and asks the network nothing.
The two pieces it is made of serve for any file:

>>> fetch("https://example.org/images.zip", Path("images.zip"), md5="5d41402a...")
>>> unpack_zip(Path("images.zip"), Path("images"))

Progress goes to standard error.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

RELEASE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
FLICKR8K_MD5 = {  # the small one first: what is wrong with the network shows at once
    "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627",
    "Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",
}
MARKER = ".downloaded"  # in the folder: the MD5 and name of each archive unpacked whole
TIMEOUT = 30.0  # seconds without a byte
PAUSES = (1.0, 3.0, 9.0)  # seconds before each new try; progress starts the count anew
MAX_UNPACKED = 8 << 30  # bytes; Flickr8k has 1.1 GB
BLOCK = 1 << 20
PASSING_ANSWERS = {408, 429, 500, 502, 503, 504}  # HTTP statuses that a new try may cure


class NetworkError(UserError):
    """The file could not be had from its address, now. The message names the address."""


class _BrokenTransferError(Exception):
    """The answer stopped short; another request may continue it."""


class _UnreachableError(_BrokenTransferError):
    """No connection could be made at all."""


def download_flickr8k(folder: Path, base_url: str | None = None) -> None:
    """Put Flickr8k into ``folder``: ``Flicker8k_Dataset/*.jpg``, the token file, the splits.

    ``base_url`` is where the archives lie, by default ``RELEASE_URL``.

    Raises ``NetworkError`` when the server cannot be reached or refuses, ``UserError`` for a
    wrong MD5, an unusable archive or a full disk. After each, the same call continues.
    """
    if (folder / "Images").is_dir() and (folder / "captions.txt").is_file():
        # A second copy of every image would make their names ambiguous.
        echo(f"{folder} holds Flickr8k as Kaggle gives it: nothing to load.", err=True)
        return
    marker = folder / MARKER
    unpacked = marker.read_text(encoding="utf-8").splitlines() if marker.is_file() else []
    missing = [name for name, md5 in FLICKR8K_MD5.items() if f"{md5}  {name}" not in unpacked]
    if not missing:
        echo(f"{folder} is complete; delete {marker} to load it again.", err=True)
    for name in missing:
        archive = folder / name
        try:
            fetch(f"{(base_url or RELEASE_URL).rstrip('/')}/{name}", archive, FLICKR8K_MD5[name])
        except NetworkError as error:
            raise NetworkError(
                f"{error.message}; run the same command again later, or unpack the Kaggle "
                f"archive adityajn105/flickr8k to {folder}"
            ) from error
        unpack_zip(archive, folder)
        unpacked.append(f"{FLICKR8K_MD5[name]}  {name}")
        # After the last image, so that the line says that all are there; before the
        # archive goes, so that a kill in between never costs a second gigabyte.
        with _disk_errors(marker), atomic_write(marker) as handle:
            handle.write("\n".join(unpacked) + "\n")
    for name in FLICKR8K_MD5:
        # The images are JPEGs: the archive is as large as they are, and of no more use.
        (folder / name).unlink(missing_ok=True)


def fetch(url: str, target: Path, md5: str) -> None:
    """Load ``url`` to ``target`` and check it; a ``.part`` file beside it is continued.

    A ``target`` with the right MD5 is left as it is, without a request. Raises
    ``NetworkError`` when nothing more can be had from the server, and ``UserError`` for a
    wrong MD5 (the file is removed), a full disk (the part is kept) or a folder that
    cannot be written.
    """
    part, tag = _part(target), _tag(target)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and _md5(target) == md5:
            return
        _load(url, target, md5)
        tag.unlink(missing_ok=True)
        if _md5(part) != md5:
            part.unlink()
            raise UserError(
                f"{url}: what arrived has a wrong MD5 and was removed; run the same command again"
            )
        part.replace(target)


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` into ``folder``, except ``__MACOSX`` and dot files.

    A member that is already there in its full size is left alone. Every name is checked
    before anything is written. Raises ``UserError`` for a damaged archive, a member that
    would land outside ``folder`` or is a link, too many bytes, or a full disk.
    """
    try:
        with _disk_errors(folder), zipfile.ZipFile(archive) as opened:
            members = _checked_members(opened, archive)
            for name, info in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                target = folder / name
                if not (target.is_file() and target.stat().st_size == info.file_size):
                    _unpack_member(opened, info, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # RuntimeError: an encrypted member, or (NotImplementedError) an unknown compression.
        raise UserError(
            f"{archive} cannot be unpacked ({error}); delete it and run the same command again"
        ) from error


def _load(url: str, target: Path, md5: str) -> None:
    """Ask until the part is whole, or until the tries are used up without progress."""
    longest, failures, reached = _size(_part(target)), 0, False
    while True:
        try:
            return _request_rest(url, target, md5)
        except _BrokenTransferError as error:
            # Compared with the longest part so far: a server that ignores Range and always
            # stops at the same byte also "loads" something each time.
            size = _size(_part(target))
            failures = 0 if size > longest else failures + 1
            longest = max(longest, size)
            # A machine without network should hear of it now, not after all the pauses.
            hopeless = isinstance(error, _UnreachableError) and not reached
            if hopeless or failures > len(PAUSES):
                raise NetworkError(f"cannot load {url}: {error}") from error
            reached = True
            time.sleep(PAUSES[max(failures - 1, 0)])


def _request_rest(url: str, target: Path, md5: str) -> None:
    """One request for what the part lacks. Returns when the part is whole."""
    part, tag = _part(target), _tag(target)
    have = _size(part)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.is_file():  # the server then sends a changed file whole instead of its rest
            headers["If-Range"] = tag.read_text(encoding="latin-1").strip()
    with _open(urllib.request.Request(url, headers=headers)) as response:
        if response.status == 416:  # nothing lies behind our last byte
            if _md5(part) == md5:
                return
            part.unlink()
            raise _BrokenTransferError("the part did not belong to this file")
        if response.status == 206:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
            if match is None or int(match[1]) != have:
                part.unlink()
                raise _BrokenTransferError(f"unusable Content-Range {content_range!r}")
            length = match[2]
        else:  # Range ignored, or the file has changed: from the start
            have = 0
            length = response.headers.get("Content-Length") or "*"
            entity = response.headers.get("ETag", "")
            tag.unlink(missing_ok=True)
            if entity.startswith('"'):  # HTTP forbids weak ones (W/"...") in If-Range
                tag.write_text(entity, encoding="latin-1")
        total = int(length) if length.isdecimal() else None
        size = _append(response, part, have, total)
    if total is not None and size != total:
        raise _BrokenTransferError(f"the connection closed after {size:,} of {total:,} bytes")


def _open(request: urllib.request.Request) -> Any:
    """The server's answer, 416 included; a refusal is a NetworkError."""
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and request.has_header("Range"):
            return error
        error.close()
        reason = f"the server answered {error.code} {error.reason}"
        if error.code in PASSING_ANSWERS:
            raise _BrokenTransferError(reason) from error
        raise NetworkError(f"cannot load {request.full_url}: {reason}") from error
    except urllib.error.URLError as error:
        raise _UnreachableError(str(error.reason)) from error
    except (OSError, HTTPException) as error:
        raise _BrokenTransferError(str(error) or type(error).__name__) from error


def _append(response: Any, part: Path, have: int, total: int | None) -> int:
    """Write the answer's body behind the first ``have`` bytes; return the size reached."""
    size = have
    with (
        part.open("ab" if have else "wb") as handle,
        progress_bar(
            desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, unit_divisor=1024
        ) as bar,
    ):
        while True:
            try:
                # read1, not read: what has come before a time-out is kept.
                block = response.read1(BLOCK)
            except (OSError, HTTPException) as error:
                # Told apart from the disk's errors, which no new request can cure.
                raise _BrokenTransferError(str(error) or type(error).__name__) from error
            if not block:
                return size
            handle.write(block)
            size += len(block)
            bar.update(len(block))


def _checked_members(
    opened: zipfile.ZipFile, archive: Path
) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """Destination and entry of each file to unpack. Refuses the archive for one bad name."""
    members = []
    for info in opened.infolist():
        name = PurePosixPath(info.filename)
        if not name.parts:  # "./", the folder itself
            continue
        # A drive letter or a backslash is harmless here and an escape on Windows.
        outside = name.is_absolute() or ".." in name.parts or re.search(r"\\|^\w:", info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archiver recorded none
        if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(
                f"{archive} is refused: its member {info.filename!r} is a link or would be "
                "written outside the folder"
            )
        hidden = any(piece.startswith(".") or piece == "__MACOSX" for piece in name.parts)
        if not hidden and not info.is_dir():
            members.append((name, info))
    # The sizes that the archive states can be relied on: zipfile stops reading there.
    total = sum(info.file_size for _, info in members)
    if total > MAX_UNPACKED:
        raise UserError(f"{archive} is refused: it would unpack to {total:,} bytes")
    return members


def _unpack_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Under another name first: a kill must not leave half an image under its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with opened.open(info) as source, temporary.open("wb") as handle:
            shutil.copyfileobj(source, handle, BLOCK)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on ``path`` into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {path}; free some space and run the same command again, "
                "it continues where it stopped"
            ) from error
        raise UserError(f"cannot use {error.filename or path}: {error.strerror}") from error


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _tag(target: Path) -> Path:
    """The file with the ETag that the server gave for what is in the part."""
    return target.with_name(target.name + ".etag.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    # The release publishes MD5s. They tell damage, not malice, and systems in FIPS mode
    # offer MD5 only to those who say so.
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
