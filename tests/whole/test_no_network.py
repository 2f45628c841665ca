"""The network is used when it is asked for, and never otherwise.

Each command runs as its own process in which every look-up of a name and every connection, but for
those within this computer that a page or ``torchrun`` needs, ends the process at once with a code
of its own. Where the system lets a test take its network away, a process has none at all besides.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw
from draw_scenes import draw_scenes
from one_process import run_in_one_process

CALLED_OUT = 87

# An audit hook sees what Python's own modules do, whichever they are.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        address = arguments[0] if event.startswith("socket.get") else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(host, str) and host.startswith(("127.", "::1", "localhost")):
            return
        if isinstance(address, (str, bytes)) and event == "socket.connect":
            return  # a Unix socket
        print(f"called out: {event} {address!r}", file=sys.stderr, flush=True)
        os._exit(87)

sys.addaudithook(watch)
"""


def run_watched(*commands: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run scripts in a folder of its own, where no data of the project lie."""
    return run_in_one_process(commands, cwd, before=WATCH, wrapper=without_network())


def without_network() -> list[str]:
    """Give the words before a command that take its network away, where this is allowed."""
    words = ["unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    return words if allowed else []


def test_the_watch_sees_a_call() -> None:
    """Else the tests below could not fail."""
    for code in (
        "import urllib.request; urllib.request.urlopen('http://example.com')",
        "import socket; socket.create_connection(('192.0.2.1', 80))",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    ):
        command = [sys.executable, "-c", WATCH + code]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == CALLED_OUT, result.stderr
        assert "called out: " in result.stderr


@pytest.mark.slow
def test_the_commands_need_no_network(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes", images=10, seed=0)
    data = f"--data {tmp_path / 'scenes'}"
    training = f"train_decoder.py {data} --features x.h5 --min-count 1"
    result = run_watched(
        f"caption.py {tmp_path / 'scenes/Images/scene_00000.jpg'} --html page.html",
        f"extract_features.py {data} --weights pretrained --output x.h5",
        f"{training} --run run --tensorboard --epochs 1 --embed-size 8 --hidden-size 8",
        f"{training} --check",
        "evaluate.py run --no-java",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    ["--data photos", "--data flickr8k --download"],  # ImageNet's weights, as --help says; Flickr8k
)
def test_what_is_asked_for_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """The watch sees each. (Shards at URLs are the third way, and need a package more.)"""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    draw(tmp_path / "photos" / "a.jpg", 1)
    result = run_watched(f"extract_features.py {arguments}", cwd=tmp_path)
    assert result.returncode == CALLED_OUT, result.stderr
    assert "called out: socket.getaddrinfo" in result.stderr
