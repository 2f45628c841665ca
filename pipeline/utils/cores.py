"""How many cores this process may use. No torch import: this sets torch's number of threads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return the number of cores this process may run on, limited by its container's quota."""
    bound = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    quota = cgroup_quota(CGROUP)
    return cores if quota is None else max(1, min(cores, round(quota)))


def cgroup_quota(root: Path) -> float | None:
    """Return the CPU quota of the container at ``root``, in cores; None if it has none.

    Reads the cgroup v2 files, falling back to v1.
    """
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        time, period_us = (int((root / "cpu" / n).read_text(encoding="ascii")) for n in names)
        return None if time < 0 else time / period_us
    return None
