"""The command that exports a captioner, and its runner on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import Result
from commands import invoke

from pipeline.cli import export as command
from pipeline.export.onnx import RUNNER

# Runs the runner where neither this project nor torch can be imported, and tells what was.
ELSEWHERE = """
import runpy, sys
sys.modules["torch"] = sys.modules["pipeline"] = None
script, *sys.argv = sys.argv[1], *sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    heavy = [m for m in ("torchvision", "h5py", "nltk", "click") if m in sys.modules]
    assert not heavy, heavy
"""


def export(*words: object, code: int = 0) -> Result:
    return invoke(command.main, *words, code=code)


def run_elsewhere(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run an export's runner, in another folder and with none of this project at hand."""
    return subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, folder / RUNNER, *map(str, words)],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
