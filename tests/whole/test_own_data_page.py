"""docs/own-data.md: its commands run, end as it says, and print what it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY
from example_layouts import write_examples

from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.find_images import find_images

PAGE = REPOSITORY / "docs" / "own-data.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENDS_WITH = re.compile(r"\s+# ends with (\d)$")


@dataclass
class Step:
    """Commands of the page, each with the exit code it names, and the lines shown after them."""

    commands: list[tuple[str, int]]
    shown: list[str] = field(default_factory=list)


def steps() -> list[Step]:
    """Read the page: ``sh`` blocks are run, ``text`` blocks after them compared.

    Other blocks show what differs from machine to machine, such as captions and scores.
    """
    found: list[Step] = []
    for kind, content in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "sh":
            commands = []
            for line in content.strip().splitlines():
                code = ENDS_WITH.search(line)
                commands.append((ENDS_WITH.sub("", line), int(code[1]) if code else 0))
            found.append(Step(commands))
        elif kind == "text":
            found[-1].shown += content.splitlines()
    return found


def shape_of(line: str) -> str:
    """Take out of a line what differs from machine to machine: arithmetic, numbers and units."""
    line = line.replace("bf16", "fp32")  # the default on CPUs with AMX
    line = re.sub(r"\d[\d.,]*", "0", line)
    return re.sub(r"0 (s|min|h|MB|GB)\b", "0 unit", line).strip()


def missing_lines(shown: list[str], printed: str) -> list[str]:
    """Return the lines of the page that a command did not print; ``...`` ends a shortened one."""
    lines = [shape_of(line) for line in printed.splitlines()]
    missing = []
    for line in shown:
        beginning = shape_of(line).removesuffix("...").rstrip()
        whole = not line.rstrip().endswith("...")
        if not any(p == beginning if whole else p.startswith(beginning) for p in lines):
            missing.append(line)
    return missing


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "python", command
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )


def prepare(folder: Path) -> None:
    """Make a folder in which the page's commands run as in the repository, but write elsewhere."""
    (folder / "data").mkdir()
    for script in (*REPOSITORY.glob("*.py"), *REPOSITORY.glob("data/*.py")):
        (folder / script.relative_to(REPOSITORY)).symlink_to(script)


@pytest.mark.slow
def test_all_commands_of_the_page_run_and_print_what_it_shows(tmp_path: Path) -> None:
    prepare(tmp_path)
    for step in steps():
        printed = ""
        for command, code in step.commands:
            done = run(command, tmp_path)
            assert done.returncode == code, f"{command}\n{done.stdout}"
            printed += done.stdout
        assert not missing_lines(step.shown, printed), printed
    assert sum(len(step.shown) for step in steps()) > 30


def test_the_examples_hold_the_same_captions_in_every_layout(tmp_path: Path) -> None:
    write_examples(tmp_path, images=20, seed=0)
    tables = {}
    for name, layout in (
        ("csv", "CSV"),
        ("coco", "COCO JSON, 2 files"),
        ("text", "folder of .txt captions"),
        ("german", "CSV"),
        ("chinese", "CSV"),
    ):
        images = find_images(tmp_path / name)
        table, found = read_captions(tmp_path / name).restrict(images)
        assert table.layout == layout and not table.notes
        assert len(found) == len(images) == (18 if name == "coco" else 20)
        tables[name] = {image.name: image.captions for image in table.images}
    assert tables["csv"] == tables["text"]
    assert tables["coco"].items() < tables["csv"].items()
    assert tables["german"].keys() == tables["chinese"].keys() == tables["csv"].keys()
    assert len(find_images(tmp_path / "new")) == 4
