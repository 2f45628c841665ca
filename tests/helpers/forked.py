"""Functions in processes forked from this one, which are there at once: a start takes seconds."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# What a process may take to end, in seconds, even where others keep the machine busy.
PATIENCE = 120.0


def start(function: Callable[[], Any], log: Path) -> int:
    """Call a function in a new process, whose output is added to a file; gives its number."""
    log.touch()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # the others were left behind
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, patience: float = PATIENCE) -> int:
    """Wait for a process; gives its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + patience
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"it did not end within {patience} s")
        time.sleep(0.005)


def run_job(function: Callable[[], Any], logs: Sequence[Path]) -> list[int]:
    """Call a function in the processes of a job, as ``torchrun`` starts them; gives their codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(logs)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        function()

    processes = [start(functools.partial(process, rank), log) for rank, log in enumerate(logs)]
    return [ended(number) for number in processes]
