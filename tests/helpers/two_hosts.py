"""Two hosts on one machine: network namespaces, joined by a cable that can be pulled out.

Each has addresses and processes of its own; the file system is shared, as a network folder would
be. Namespaces need Linux, iproute2 and root's rights; without them the tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY

ADDRESSES = ("10.213.0.1", "10.213.0.2")
PORT = 29400
CABLE = "cable"  # the name of each host's network interface


class Host:
    """One of the two hosts.

    Attributes:
        number: 0 or 1; 0 is where the hosts meet.
        output: what its processes have said so far.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.namespace = f"captioner-{os.getpid()}-{number}"
        self.output = folder / f"host-{number}.txt"

    def ip(self, *arguments: str) -> None:
        """Configure this host's network."""
        subprocess.run(["ip", "-n", self.namespace, *arguments], check=True)

    def torchrun(self, script: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start this host's part of a job, one process of it, as docs/scale.md has it."""
        meeting = f"is_host={self.number == 0},keep_alive_interval=2"
        command = [
            *("ip", "netns", "exec", self.namespace),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"),
            *("--rdzv-conf", meeting, "--local-addr", ADDRESSES[self.number]),
            *("--max-restarts", "3", "--", script, *map(str, arguments)),
        ]
        environment = {
            "GLOO_SOCKET_IFNAME": CABLE,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        with self.output.open("a", encoding="utf-8") as handle:
            return subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdout=handle,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def kill(self) -> None:
        """End all processes at once: those of torchrun would outlive it."""
        command = ["ip", "netns", "pids", self.namespace]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        for process in found.stdout.split():
            os.kill(int(process), signal.SIGKILL)

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")


class Cable:
    """What joins the hosts."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def pull_out(self) -> None:
        self._host.ip("link", "set", CABLE, "down")

    def plug_in(self) -> None:
        self._host.ip("link", "set", CABLE, "up")


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host, Cable]]:
    """Make two hosts for a test, or skip it; ``folder`` keeps what their processes say."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (Linux), for network namespaces")
    hosts = Host(0, folder), Host(1, folder)
    made = []
    try:
        for host in hosts:
            ended = subprocess.run(
                ["ip", "netns", "add", host.namespace], capture_output=True, text=True, check=False
            )
            if ended.returncode:
                pytest.skip(f"may not make network namespaces: {ended.stderr.strip()}")
            made.append(host)
        ends = [["name", CABLE, "netns", host.namespace] for host in hosts]
        subprocess.run(
            ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True
        )
        for host, address in zip(hosts, ADDRESSES, strict=True):
            host.ip("address", "add", f"{address}/24", "dev", CABLE)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", CABLE, "up")
        yield *hosts, Cable(hosts[1])
    finally:
        for host in made:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.namespace], check=True)
