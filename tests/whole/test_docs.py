"""README and docs show what the program prints, and name what exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def transcript() -> list[tuple[str, str]]:
    """The commands of the console block, each with what it prints."""
    [block] = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    parts = re.split(r"^\$ python (.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The folder of the transcript: three photographs of scikit-image, and a broken one."""
    skimage = pytest.importorskip("skimage", reason="scikit-image is not installed")
    source, folder = Path(skimage.data_dir), tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.png", "motorcycle_left.png", "rocket.jpg"):
        shutil.copy(source / name, folder)
    (folder / "broken.png").write_bytes((source / "coffee.png").read_bytes()[:500])
    return folder


@pytest.mark.slow
def test_the_transcript_is_what_the_commands_print(photos: Path) -> None:
    commands = transcript()
    assert len(commands) == 1
    for command, shown in commands:
        script, *words = command.split()
        ended = subprocess.run(
            [sys.executable, str(REPOSITORY / script), *words],
            cwd=photos.parent,  # no runs of one's own there
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        lines = shown.splitlines()
        captions = [line for line in lines if line.startswith("photos/")]
        said = [line for line in lines if line not in captions]
        assert _rounded(ended.stdout.splitlines()) == _rounded(captions)
        # Progress may come between, on a slow machine.
        assert [line for line in ended.stderr.splitlines() if "left" not in line] == said
        assert ended.returncode == any(line.startswith("failed") for line in lines)


def _rounded(lines: list[str]) -> list[str]:
    """Round log-probabilities, of which other processors make other last digits."""
    return [re.sub(r"\t-(\d+\.\d+)$", lambda m: f"\t-{float(m[1]):.1f}", line) for line in lines]


PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "SECURITY.md",
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "data").rglob("*.md"),
]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    checked = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                target, _, anchor = link.partition("#")
                path = page.parent / target if target else page
                assert path.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(path), f"{page.name}: {link}"
                checked += 1
    assert checked > 30


def test_files_that_are_named_exist() -> None:
    named = r"`((?:pipeline|tests|benchmarks)/[\w/.-]+)`"
    for page in PAGES:
        for path in re.findall(named, page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


def commands_of(page: Path) -> list[list[str]]:
    """The command lines of the project's programs in a page's code blocks and inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(
        r"^(?: {4}|\$ )?((?:.*\| )?(?:python \w+\.py|captioner \w+)\b.*)$", text, re.M
    )
    lines += re.findall(r"`((?:python \w+\.py|captioner \w+) [^`]*)`", text)
    found = []
    for line in lines:
        if "`" not in line and "--help" not in line:
            words = shlex.split(line.rpartition("| ")[2], comments=True)
            found.append(words[1:] if words[0] == "python" else words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    """Unknown commands and options, and values out of range, are errors; nothing is run."""
    for program, *arguments in commands_of(page):
        if program == "captioner":
            program = f"pipeline.cli.{arguments.pop(0)}"
        command = importlib.import_module(program.removesuffix(".py")).main
        command.make_context(program, arguments)


def test_commands_are_found() -> None:
    assert ["caption.py", "photos/"] in commands_of(REPOSITORY / "README.md")
    assert len(commands_of(REPOSITORY / "README.md")) > 8
