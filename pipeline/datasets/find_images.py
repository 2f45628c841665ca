"""Find the images in a folder, leaving out those that programs keep there for their own use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from pipeline.datasets.images import IMAGE_EXTENSIONS
from pipeline.utils.errors import UserError

# Folders of other programs -> what they are (docs/questions.md lists them).
SKIPPED_FOLDERS = {
    ".*": "hidden folders",
    "__MACOSX": "leftovers of macOS archives",
    "@eaDir": "folders of thumbnails",  # Synology
    "*.lrdata": "folders of thumbnails",  # Lightroom
    "#recycle": "recycle bins",  # Synology
    "@Recycle": "recycle bins",  # QNAP
    "$RECYCLE.BIN": "recycle bins",  # Windows
    "RECYCLER": "recycle bins",
    "#snapshot": "snapshots",  # Synology
    "@Recently-Snapshot": "snapshots",  # QNAP
    "~snapshot": "snapshots",  # NetApp
    "lost+found": "lost files of a file system",
}
THUMBNAILS = "SYNOPHOTO_THUMB_*"
OTHER_ENDINGS = "files with other endings"
# Marks a run folder, whose curves.png is skipped.
RUN_FILE = "config.json"


def skipped_folder(name: str) -> str | None:
    """Return the kind of a folder whose images are not the user's own; None for any other."""
    for pattern, kind in SKIPPED_FOLDERS.items():
        if fnmatchcase(name.lower(), pattern.lower()):
            return kind
    return None


def skipped_file(name: str) -> str | None:
    """Return why a file is left out, by its name; None for an image."""
    if name.startswith("."):
        return "hidden files"
    if fnmatchcase(name, THUMBNAILS):
        return "thumbnails"
    return None if Path(name).suffix.lower() in IMAGE_EXTENSIONS else OTHER_ENDINGS


def _unlistable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def find_images(
    folder: Path,
    skipped: Counter[str] | None = None,
    on_error: Callable[[OSError], None] = _unlistable,
) -> list[str]:
    """List the images under ``folder`` by their relative paths (with ``/``), in byte order.

    Subfolders are searched and symbolic links to folders followed (each folder once, so loops
    end). Hidden files, and files that other programs keep for their own use, are left out.

    Args:
        folder: where to search.
        skipped: counts what was left out, by kind.
        on_error: called with the error if a folder cannot be listed; the folder is left out.

    Raises:
        UserError: ``folder`` is not a folder; or, by default, a folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    skipped = Counter() if skipped is None else skipped
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=on_error):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Folders that a browser, or caption.py with --thumbnails, saves beside a page.
        pages = [name for name in files if name.lower().endswith((".html", ".htm"))]
        page_files = {f"{Path(name).stem}_files" for name in pages}
        kinds = {name: skipped_folder(name) for name in folders}
        kinds |= dict.fromkeys(page_files & kinds.keys(), "folders of web pages")
        folders[:] = [name for name in folders if kinds[name] is None]
        reasons = {name: skipped_file(name) for name in files}
        if RUN_FILE in reasons and "curves.png" in reasons:
            reasons["curves.png"] = "curves of training runs"
        skipped.update(kind for kind in (*kinds.values(), *reasons.values()) if kind)
        relative = Path(parent).relative_to(folder)
        names += [(relative / name).as_posix() for name, reason in reasons.items() if not reason]
    return sorted(names, key=os.fsencode)


def describe_skipped(skipped: Counter[str]) -> str:
    """Return a line such as ``skipped: recycle bins (2)``; empty if nothing was left out."""
    counts = [f"{kind} ({count:,})" for kind, count in sorted(skipped.items())]
    return f"skipped: {', '.join(counts)}" if counts else ""
