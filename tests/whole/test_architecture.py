"""docs/architecture.md names what exists."""

from __future__ import annotations

import functools
import importlib
import re

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
DRAWING = (REPOSITORY / "docs" / "architecture.svg").read_text(encoding="utf-8")


def test_every_function_exists() -> None:
    names = re.findall(r"`((?:[a-z_]+/)?[a-z_]+)\.((?:[A-Z]\w+\.)?\w+)`", PAGE)
    functions = [
        (module, name) for module, name in names if name not in ("py", "svg", "toml", "cfg")
    ]
    assert len(functions) > 20
    missing = []
    for module, name in functions:
        try:
            imported = importlib.import_module(f"pipeline.{module.replace('/', '.')}")
            functools.reduce(getattr, name.split("."), imported)
        except (ImportError, AttributeError) as error:
            missing.append(str(error))
    assert not missing


def test_every_module_exists() -> None:
    files = re.findall(r"`((?:[a-z_]+/)+\w+\.py)`", PAGE)
    assert len(files) > 10
    missing = [file for file in files if not (REPOSITORY / "pipeline" / file).is_file()]
    assert not missing


def test_every_room_is_drawn() -> None:
    drawn = re.findall(r'class="t" x="[\d.]+" y="\d+">(\w+)</text>', DRAWING)
    rooms = {path.parent.name for path in (REPOSITORY / "pipeline").glob("*/__init__.py")}
    assert set(drawn) == rooms | {"captioner", "evaluation"}
