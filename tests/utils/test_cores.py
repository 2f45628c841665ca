"""The number of cores and threads: those that a process may use, not those of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.utils import cores


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores.cgroup_quota(tmp_path) == quota
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)}, raising=False)
    assert cores.available_cores() == {1.5: 2, 0.5: 1, None: 64}[quota]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes")
@pytest.mark.parametrize(
    "given, threads, policy",
    [({}, 1, "PASSIVE"), ({"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}, 3, "ACTIVE")],
)
def test_torch_starts_a_thread_per_core_and_none_spins_unless_the_user_says_otherwise(
    given: dict[str, str], threads: int, policy: str
) -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import pipeline, torch; print(*map(os.getenv, ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY')))"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=others | {"OMP_DISPLAY_ENV": "TRUE"} | given,  # OpenMP says what it has read
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"{threads} {policy}\n"
    read = ended.stderr.replace(" ", "")
    assert f"OMP_WAIT_POLICY='{policy}'" in read and f"OMP_NUM_THREADS='{threads}'" in read
