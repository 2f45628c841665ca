"""Flickr8k: download, unpacking and the official split."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import importlib.resources
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

RELEASE_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
FLICKR8K_MD5 = {  # the small one first: network problems show at once
    "Flickr8k_text.zip": "bf6c1abcb8e4a833b7f922104de18627",
    "Flickr8k_Dataset.zip": "f18a1e2920de5bd84dae7cf08ec78978",
}
MARKER = ".downloaded"  # in the folder: the MD5 and name of each fully unpacked archive
TIMEOUT = 30.0  # seconds without a byte
TRIES, PAUSE = 3, 2.0  # consecutive tries without progress, and seconds between them
BLOCK = 1 << 20
FLICKR8K_NAME = re.compile(r"(?:.*/)?(?P<photo>\d{1,19})_[0-9a-f]{10}\.jpg")


class NetworkError(UserError):
    """A file cannot be downloaded. The message names its URL."""


@functools.cache
def official_split() -> dict[int, str]:
    """Return the split of each of the 8,000 photo ids, the leading numbers of the file names."""
    packed = importlib.resources.files(__package__).joinpath("flickr8k_split.txt.gz").read_bytes()
    pairs = (line.split() for line in gzip.decompress(packed).decode("ascii").splitlines())
    return {int(photo): split for split, photo in pairs}


def official_splits(names: Sequence[str]) -> dict[str, str] | None:
    """Return the official split of each image name; None unless 9 in 10 are Flickr8k's."""
    official = official_split()
    splits: dict[str, str] = {}
    for name in names:
        parts = FLICKR8K_NAME.fullmatch(name)
        if parts and int(parts["photo"]) in official:
            splits[name] = official[int(parts["photo"])]
    return splits if len(splits) >= 0.9 * len(names) else None


def download_flickr8k(folder: Path) -> None:
    """Download Flickr8k to ``folder``: ``Flicker8k_Dataset/*.jpg``, token file and split lists.

    The same call resumes after an interruption; for a complete folder it makes no request.

    Raises:
        NetworkError: the server cannot be reached or refuses.
        UserError: a wrong MD5, an unusable archive or a full disk.
    """
    if (folder / "Images").is_dir() and (folder / "captions.txt").is_file():
        # A second copy of every image would make their names ambiguous.
        echo(f"{folder} holds Kaggle's copy of Flickr8k: nothing to download.", err=True)
        return
    marker = folder / MARKER
    unpacked = marker.read_text(encoding="utf-8").split() if marker.is_file() else []
    missing = {name: md5 for name, md5 in FLICKR8K_MD5.items() if md5 not in unpacked}
    if not missing:
        echo(f"{folder} is complete; delete {marker} to download it again.", err=True)
    for name, md5 in missing.items():
        archive = folder / name
        try:
            fetch(RELEASE_URL + name, archive, md5)
        except NetworkError as error:
            raise NetworkError(
                f"{error.message}; run the same command again later, or unpack the Kaggle "
                f"archive adityajn105/flickr8k to {folder}"
            ) from error
        unpack_zip(archive, folder)
        unpacked += [md5, name]
        # Before the archive is deleted, so that a kill never costs another 1 GB download.
        with _disk_errors(marker), atomic_write(marker) as handle:
            handle.write("\n".join(unpacked))
    for name in FLICKR8K_MD5:
        (folder / name).unlink(missing_ok=True)


def fetch(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target`` and check its MD5, resuming any ``.part`` file beside it.

    If ``target`` already has the right MD5, no request is made.

    Raises:
        NetworkError: the server cannot be reached, refuses, or sends nothing new.
        UserError: a wrong MD5 (the part is removed) or a full disk (the part is kept).
    """
    part = target.with_name(target.name + ".part")
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and _md5(target) == md5:
            return
        with part.open("ab") as handle:
            longest, failures = handle.tell(), 0
            while True:
                try:
                    _load_rest(url, handle, part.stem)
                    break
                except (OSError, HTTPException) as error:
                    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    # A server may ignore Range and always stop at the same byte.
                    failures = 0 if handle.tell() > longest else failures + 1
                    longest = max(longest, handle.tell())
                    refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                    if refused or failures == TRIES:
                        reason = getattr(error, "reason", None) or error
                        raise NetworkError(f"cannot load {url}: {reason}") from error
                    time.sleep(PAUSE)
        if _md5(part) != md5:
            part.unlink()
            raise UserError(
                f"{url}: the file has a wrong MD5 and was removed; run the same command again"
            )
        part.replace(target)


def _load_rest(url: str, handle: IO[bytes], name: str) -> None:
    """Make one request for the rest of the file after ``handle``'s end, and append it."""
    have = handle.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing, or the MD5 will differ
            return
        raise
    with response:
        if have and response.status != 206:  # the server ignores Range
            handle.truncate(0)
            have = 0
        total = None if response.length is None else have + response.length
        bar = progress_bar(
            desc=name, initial=have, total=total, unit="B", unit_scale=True, unit_divisor=1024
        )
        with bar:
            # read1, not read: keeps the bytes received before a timeout.
            while block := response.read1(BLOCK):
                handle.write(block)
                bar.update(len(block))
        handle.flush()
        if response.length:
            raise ConnectionError(
                f"the connection closed after {handle.tell():,} of {total:,} bytes"
            )


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` into ``folder``, except ``__MACOSX``, dot files and names with ``..``.

    zipfile turns links into plain files and absolute names into relative ones. Raises UserError
    for a damaged archive or a full disk.
    """
    try:
        with _disk_errors(folder), zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                parts = PurePosixPath(member.filename).parts
                if not any(part.startswith((".", "__MACOSX")) for part in parts):
                    opened.extract(member, folder)
    except UserError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged files
        raise UserError(
            f"{archive} cannot be unpacked ({error}); delete it and run the same command again"
        ) from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors on ``path`` into one-line ``UserError``s."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {path}; free some space and run the same command again: "
                "it resumes"
            ) from error
        raise UserError(f"cannot use {error.filename or path}: {error.strerror}") from error


def _md5(path: Path) -> str:
    # Detects damage, not tampering: the only use of MD5 that FIPS mode allows.
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
