"""Many clients of ``caption.py --serve`` at once: how soon each is answered, and how fairly."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import ROOT, echo, memory_of

BOUNDARY = "a-client-of-the-load"


@dataclass
class Client:
    """A client, and the responses that it got.

    Attributes:
        waits: seconds from each request to its answer, refusals included.
        refusals: number of 503 responses, after which it tried again.
        problems: other responses without a caption.
    """

    waits: list[float] = field(default_factory=list)
    refusals: int = 0
    problems: list[str] = field(default_factory=list)

    def ask(self, port: int, images: Sequence[Path], until: float) -> None:
        """Send one image after the other until the time ``until`` (``time.monotonic``)."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
        for image in images:
            began = time.monotonic()
            if began > until:
                break
            try:
                while not self._answered(connection, image):
                    pass
            except (OSError, http.client.HTTPException) as error:
                self.problems.append(f"{type(error).__name__}: {error}")
                connection.close()
                continue
            self.waits.append(time.monotonic() - began)
        connection.close()

    def _answered(self, connection: http.client.HTTPConnection, image: Path) -> bool:
        """Send an image; if the server refuses, wait as long as it asks and return False."""
        head = f'Content-Disposition: form-data; name="image"; filename="{image.name}"'
        body = b"\r\n".join(
            [
                f"--{BOUNDARY}\r\n{head}\r\n".encode(),
                image.read_bytes(),
                f"--{BOUNDARY}--\r\n".encode(),
            ]
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        connection.request("POST", "/caption", body, headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        if answer.status == 503:
            self.refusals += 1
            time.sleep(float(answer.headers["Retry-After"]))
            return False
        if answer.status != 200 or not content["images"][0].get("captions"):
            self.problems.append(f"{answer.status}: {content}")
        return True


def serve_clients(images: Sequence[Path], folder: Path, count: int, seconds: int) -> dict[str, str]:
    """Start the server, run ``count`` clients at once for ``seconds``, and stop it."""
    temporary = folder / "uploads"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "caption.py", "--serve", "--port", "0", "--model", "pretrained"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # BROWSER: the program that would open the page.
        env={**os.environ, "TMPDIR": str(temporary), "BROWSER": "true"},
    )
    assert process.stderr is not None
    port = next(
        int(found.group(1))
        for found in (re.search(r"http://127\.0\.0\.1:(\d+)/", line) for line in process.stderr)
        if found
    )
    clients = [Client() for _ in range(count)]
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(
            target=client.ask,
            # Each client begins with another image.
            args=(port, [*images[number % len(images) :], *images] * 100, until),
        )
        for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(memory_of(process.pid, "VmRSS"))
    process.send_signal(signal.SIGINT)
    complaints = process.communicate(timeout=60)[1]
    problems = [problem for client in clients for problem in client.problems]
    if problems or complaints or process.returncode or any(temporary.iterdir()):
        raise RuntimeError(
            f"{len(problems)} problems: {problems[:3]}; the server ended with "
            f"{process.returncode}: {complaints}; left: {len(list(temporary.iterdir()))} uploads"
        )
    return describe(clients, seconds, memory)


def describe(clients: Sequence[Client], seconds: int, memory: Sequence[float]) -> dict[str, str]:
    """Describe the result as rows of the table."""
    waits = sorted(wait for client in clients for wait in client.waits)
    each = sorted(len(client.waits) for client in clients)
    quarter = max(1, len(memory) // 4)
    early, late = (
        max(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:])
    )
    echo(f"  server: answers of each client: {each}")
    return {
        f"{len(clients)} clients for {seconds} s: answers, errors, refusals (503)": (
            f"{len(waits):,}, 0, {sum(client.refusals for client in clients):,}"
        ),
        "response time, seconds: median, 95th percentile, maximum": (
            f"{statistics.median(waits):.1f}, {waits[int(0.95 * (len(waits) - 1))]:.1f}, "
            f"{waits[-1]:.1f}"
        ),
        "answers per client: minimum, maximum": f"{each[0]}, {each[-1]}",
        "memory of the server, GB: in the second quarter, in the last": f"{early:.2f}, {late:.2f}",
    }
