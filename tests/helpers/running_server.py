"""A server in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.captioner import Captioner


@contextmanager
def running(captioner: Captioner) -> Iterator[int]:
    """Serve the page on a free port while the block runs; yields the port."""
    from pipeline.serve.app import listen, make_server

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
