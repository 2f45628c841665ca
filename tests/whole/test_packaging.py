"""What setup.cfg installs: every room, and the files that the code reads beside its modules."""

from __future__ import annotations

import configparser
import re
from fnmatch import fnmatch
from pathlib import Path

from conftest import REPOSITORY

CONFIG = configparser.ConfigParser()
CONFIG.read(REPOSITORY / "setup.cfg", encoding="utf-8")


def folder_of(package: str) -> Path:
    """Return where a package of setup.cfg lies."""
    own = dict(
        line.replace(" ", "").split("=")
        for line in CONFIG["options"]["package_dir"].split("\n")
        if line
    )
    return REPOSITORY / own.get(package, package.replace(".", "/"))


def test_every_room_is_installed() -> None:
    listed = set(CONFIG["options"]["packages"].split())
    rooms = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "pipeline").rglob("__init__.py")
    }
    assert listed - rooms == {"pipeline.pretrained_model"}
    assert not rooms - listed


def test_every_data_file_is_installed() -> None:
    patterns = {
        folder_of(package): [pattern.strip() for pattern in listed.split(",")]
        for package, listed in CONFIG["options.package_data"].items()
    }
    wanted = [
        path
        for folder in (REPOSITORY / "pipeline", REPOSITORY / "data" / "pretrained")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert len(wanted) > 5
    for path in wanted:
        assert any(
            path.is_relative_to(folder) and fnmatch(str(path.relative_to(folder)), pattern)
            for folder, listed in patterns.items()
            for pattern in listed
        ), path


def test_security_md_gives_the_lower_bounds_of_setup_cfg() -> None:
    page = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z, -]+) \| ([\d., ]+) \| CVE", page, re.MULTILINE)
    assert len(rows) > 7
    required = (REPOSITORY / "setup.cfg").read_text(encoding="utf-8")
    for packages, versions in rows:
        for package, version in zip(packages.split(", "), versions.split(", "), strict=True):
            assert re.search(rf"(^|\s){package}>={version}$", required, re.MULTILINE), package
