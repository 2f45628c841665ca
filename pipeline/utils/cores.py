"""How many cores this process may use; without torch, whose threads it decides."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return the cores that this process is bound to, or fewer if its container has a quota."""
    bound = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    quota = cgroup_quota(CGROUP)
    return cores if quota is None else max(1, min(cores, round(quota)))


def cgroup_quota(root: Path) -> float | None:
    """Return the CPU quota of the container at ``root``, in cores; None if it has none.

    Reads the files of cgroups v2, else of v1.
    """
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        time, period_us = (int((root / "cpu" / n).read_text(encoding="ascii")) for n in names)
        return None if time < 0 else time / period_us
    return None
