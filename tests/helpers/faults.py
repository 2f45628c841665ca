"""Faults of disks and folders, made on purpose."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import resource
except ImportError:
    pytest.skip("Windows has no such limits", allow_module_level=True)


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes while the block runs, as where a disk is full.

    The error is another one (``EFBIG``), but it comes where that of a full disk would.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Have a file system of its own, of so many bytes, at a new folder; skips where that needs
    rights that the tests have not.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Keep anything from being written in a folder while the block runs."""
    root = os.geteuid() == 0  # whom permissions do not hold up
    if root and not folder.is_relative_to(tempfile.gettempdir()):
        pytest.skip("the folder of the tests is for root alone")
    closed = [f for f in folder.parents if not f.stat().st_mode & 1] if root else []
    modes = [parent.stat().st_mode for parent in closed]
    folder.chmod(0o555)
    for parent in closed:
        parent.chmod(0o711)
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for parent, mode in zip(closed, modes, strict=True):
            parent.chmod(mode)
        folder.chmod(0o755)
