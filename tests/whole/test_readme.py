"""The README shows what the program prints, and names what is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_transcript_is_what_the_commands_print(photos: Path) -> None:
    commands = transcript()
    assert len(commands) == 2
    for command, shown in commands:
        script, *words = command.split()
        ended = subprocess.run(
            [sys.executable, str(ROOT / script), *words],
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


def test_every_file_that_is_named_is_there() -> None:
    for text in (ROOT / "docs").glob("*.md"):
        check_links(text)
    check_links(ROOT / "README.md")
    table = README[README.index("## What is where") :]
    for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        assert (ROOT / first).exists(), first
        for name in others:  # named without the folder of the first, or at the top
            assert ((ROOT / first).parent / name).exists() or (ROOT / name).exists(), name


def check_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_module_stands_in_the_table() -> None:
    table = README[README.index("## What is where") :]
    for module in sorted((ROOT / "pipeline").glob("*.py")):
        if module.name not in ("__init__.py", "errors.py", "files.py", "progress.py"):
            assert f"{module.name}`" in table, module.name
