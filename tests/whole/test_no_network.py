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
from conftest import REPOSITORY, draw
from drawn_run import DrawnRun

CALLED_OUT = 87

# Runs a script as __main__. An audit hook sees what Python's own modules do, whichever they are.
WATCHED = """
import os, runpy, sys

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
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_watched(script: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts in a folder of its own, where no data of the project lie."""
    command = [sys.executable, "-c", WATCHED, str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(
        [*without_network(), *command], cwd=cwd, capture_output=True, text=True, check=False
    )


def without_network() -> list[str]:
    """Give the words before a command that take its network away, where this is allowed."""
    words = ["unshare", "--map-root-user", "--net"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    return words if allowed else []


def test_the_watch_sees_a_call(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    for number, code in enumerate(
        (
            "import urllib.request; urllib.request.urlopen('http://example.com')",
            "import socket; socket.create_connection(('192.0.2.1', 80))",
            "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        )
    ):
        script = tmp_path / f"{number}.py"
        script.write_text(code)
        command = [sys.executable, "-c", WATCHED, str(script)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == CALLED_OUT, result.stderr
        assert "called out: " in result.stderr


def test_captions_come_without_a_network(tmp_path: Path) -> None:
    draw(tmp_path / "photos" / "a.jpg", 1)
    result = run_watched("caption.py", "photos", "--html", "page.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_stages_need_no_network(drawn_run: DrawnRun, tmp_path: Path) -> None:
    data = ["--data", str(drawn_run.data)]
    features = ["--features", str(drawn_run.features)]
    small = ["--epochs", "1", "--embed-size", "8", "--hidden-size", "8"]
    weights = ["--weights", "pretrained", "--output", "x.h5"]
    for script, arguments in (
        ("extract_features.py", [*data, *weights]),
        ("train_decoder.py", [*data, *features, "--run", "run", "--tensorboard", *small]),
        ("train_decoder.py", [*data, *features, "--check"]),
        ("evaluate.py", ["run", "--no-java"]),
    ):
        result = run_watched(script, *arguments, cwd=tmp_path)
        assert result.returncode == 0, (script, result.stderr)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("extract_features.py", ["--data", "photos"]),  # ImageNet's weights, as --help says
        ("extract_features.py", ["--data", "flickr8k", "--download"]),
    ],
)
def test_what_is_asked_for_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, arguments: list[str]
) -> None:
    """The watch sees each. (Shards at URLs are the third way, and need a package more.)"""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    draw(tmp_path / "photos" / "a.jpg", 1)
    result = run_watched(script, *arguments, cwd=tmp_path)
    assert result.returncode == CALLED_OUT, result.stderr
    assert "called out: socket.getaddrinfo" in result.stderr
