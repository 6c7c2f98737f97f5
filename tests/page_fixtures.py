"""Debian's Chromium for tests of the live page, and what a page did while a test looked at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

# CI keeps what is here; git does not.
SCREENSHOTS = Path(__file__).parent.parent / "results" / "screenshots"
PATIENCE_MS = 60_000


def _chromium() -> str:
    path = shutil.which("chromium")
    if path is None:
        missing = "the live page is tested in Chromium: install Debian's package `chromium`"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


# Playwright's own loop runs as long as it does, and asyncio.run refuses to work beside it: so it
# ends with the module that used it.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser, one for each module."""
    path = _chromium()
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page and what it complained about."""

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)  # requests to elsewhere

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def on_request(self, request: Request) -> None:
        if not request.url.startswith(self.origin):
            self.strangers.append(request.url)

    def told(self, *, quiet: bool = True) -> list[str]:
        """What there was to complain about since the last time.

        Args:
            quiet: False if the test made requests fail, which browsers write to the console.
        """
        found = [each for each in self.errors if quiet or "Failed to load resource" not in each]
        found += self.strangers
        self.errors.clear()
        self.strangers.clear()
        return found

    def shot(self, name: str) -> None:
        """Keeps a picture of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@contextmanager
def watched_page(
    browser: Browser, url: str, *, quiet: bool = True, **options: Any
) -> Iterator[Watched]:
    """The live page, loaded; at the end it has complained about nothing and asked no stranger.

    Args:
        browser: to open it in.
        url: of the server.
        quiet: as for :meth:`Watched.told`.
        options: of the browser's context.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    watched = Watched(page, url)
    page.on("console", watched.on_console)
    page.on("pageerror", lambda error: watched.errors.append(f"thrown: {error}"))
    page.on("request", watched.on_request)
    try:
        page.goto(url)
        yield watched
    finally:
        context.close()
    assert watched.told(quiet=quiet) == []
