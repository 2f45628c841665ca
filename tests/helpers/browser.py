"""Chromium for the tests of pages; without it, or without Playwright, they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Request

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextmanager
def browser_page(
    own: str = "http://127.0.0.1:", **options: Any
) -> Iterator[tuple[Page, list[str]]]:
    """Open an empty page in a browser of its own.

    Args:
        own: how the addresses begin that the page may ask for.
        options: of Playwright's ``new_page``: ``viewport``, ``color_scheme``, ``permissions``.

    Yields:
        The page, and the list of what went wrong on it so far: errors on the console (a breach of
        the content security policy is one), uncaught exceptions, and requests beyond ``own``.
    """
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    problems: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        # Chromium also warns of tests that read pixels several times.
        if message.type in ("error", "warning") and "getImageData" not in message.text:
            problems.append(f"{message.type}: {message.text}")

    def on_request(request: Request) -> None:
        if not request.url.startswith((own, "data:", "blob:")):
            problems.append(f"request: {request.url}")

    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        try:
            page = launched.new_page(**options)
            page.set_default_timeout(20_000)  # ms; other work may go on beside the tests
            page.on("console", on_console)
            page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
            page.on("request", on_request)
            yield page, problems
        finally:
            launched.close()
