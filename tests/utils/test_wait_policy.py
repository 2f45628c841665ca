"""Threads that wait leave the cores to other programs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SCRIPT = "import pipeline, torch, os; print(os.environ['OMP_WAIT_POLICY'])"


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_are_passive_unless_the_user_set_the_policy(
    own: str | None, expected: str
) -> None:
    """OpenMP itself prints the policy that it read when it was loaded."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE", "OMP_NUM_THREADS": "1"}
    environment.pop("OMP_WAIT_POLICY", None)
    if own:
        environment["OMP_WAIT_POLICY"] = own
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split()[-1] == expected
    shown = [line for line in ended.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    assert all(expected in line for line in shown)
    assert shown or sys.platform != "linux"
