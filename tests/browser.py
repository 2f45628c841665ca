"""A page in a real browser, for the tests of what people see."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

# What the browser would do beside the page, and what needs hardware.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextmanager
def browser_page(**options: Any) -> Iterator[tuple[Page, list[str]]]:
    """Open an empty page in Chromium; skip the test where there is none.

    Args:
        options: of the browser's context, such as ``color_scheme`` and ``viewport``.

    Yields:
        The page, and a list that grows with every complaint: errors and warnings on the console,
        exceptions, and requests that leave this machine.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        try:
            page = browser.new_context(**options).new_page()
            page.set_default_timeout(20_000)
            page.on(
                "console",
                lambda message: (
                    complaints.append(f"console: {message.text}")
                    if message.type in ("error", "warning")
                    else None
                ),
            )
            page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
            page.on(
                "request",
                lambda request: (
                    complaints.append(f"request: {request.url}")
                    if _is_foreign(request.url)
                    else None
                ),
            )
            yield page, complaints
        finally:
            browser.close()


def _is_foreign(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme not in ("file", "blob", "data", "about") and parts.hostname not in (
        "127.0.0.1",
        "localhost",
    )
