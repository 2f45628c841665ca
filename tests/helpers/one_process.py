"""Several commands in one process that is not this one: a process takes seconds to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import REPOSITORY

HELPERS = Path(__file__).parent
# Python code to run first: the encoder is the tiny one.
TINY_INCEPTION = """
import pipeline.models.encoder, tiny_inception
pipeline.models.encoder.Inception3 = tiny_inception.TinyInception
"""
RUN_ALL = """
import json, runpy, sys

for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{script}: exit code {end.code}")
"""


def run_in_one_process(
    commands: Sequence[str],
    folder: Path,
    before: str = "",
    wrapper: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run scripts of this project one after the other, until one of them fails.

    Args:
        commands: the script and its arguments, separated by spaces.
        folder: where they run; made if it is missing.
        before: Python code to run first.
        wrapper: the words before the command.
        environment: variables added to this process's own.
    """
    folder.mkdir(exist_ok=True)
    scripts = []
    for command in commands:
        script, *arguments = command.split()
        scripts.append([str(REPOSITORY / script), *arguments])
    return subprocess.run(
        [*wrapper, sys.executable, "-c", before + RUN_ALL, json.dumps(scripts)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{HELPERS}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
