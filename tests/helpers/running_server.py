"""A server in a thread of the tests; without the extra ``serve`` they are skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline import Captioner

for package in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the extra 'serve' is not installed")

from pipeline.serve.app import listen, make_server  # noqa: E402


@contextmanager
def running(captioner: Captioner) -> Iterator[int]:
    """Serve the page on a free port while the block runs; yields the port."""
    with listen(0) as listener:
        server = make_server(captioner, "drawn")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
