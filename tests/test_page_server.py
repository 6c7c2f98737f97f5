"""The live page on a real server: a prompt is tried, and the map follows what the engine does."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page_fixtures import PATIENCE_MS, Watched, browser, watched_page
from tests.running_server import RunningServer

__all__ = ["browser"]

pytest_plugins = ("tests.server_fixtures",)

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def watched_of_module(browser: Browser, server_of_session: RunningServer) -> Iterator[Watched]:
    size: Any = {"width": 1280, "height": 900}
    with watched_page(browser, server_of_session.url, viewport=size) as watched:
        expect(watched.page.locator("#connection")).to_have_text("live")
        expect(watched.page.locator("#model")).to_contain_text("embedded")
        yield watched


@pytest.fixture
def watched(watched_of_module: Watched, server: RunningServer) -> Watched:
    """The module's page; the test may have written into its form."""
    return watched_of_module


def count_of(page: Page, state: str) -> str:
    return f"#map-legend [data-state={state}] b"


def wait_for_cells(page: Page, state: str) -> None:
    expect(page.locator(count_of(page, state))).not_to_have_text("0")


def test_prompt_by_keyboard_grows_and_ends(watched: Watched) -> None:
    page = watched.page
    page.reload()  # the focus is at its beginning
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the prompt
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("Once upon a time")
    page.evaluate("""() => {
        window.lengths = new Set();
        const answer = document.getElementById("answer");
        new MutationObserver(() => window.lengths.add(answer.textContent.length)).observe(
            answer, {childList: true});
    }""")
    page.keyboard.press("Control+Enter")
    status = page.locator("#answer-status")
    expect(status).to_have_text(re.compile(r"finished \((length|stop)\): \d+ tokens? in .+"))
    assert page.evaluate("window.lengths.size") > 2
    assert len(page.get_by_role("region", name="Answer").inner_text()) > 20
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert watched.told() == []


def test_stop_ends_the_request(watched: Watched, server: RunningServer) -> None:
    page = watched.page
    page.get_by_label("Prompt", exact=True).fill("Count for long:")
    page.get_by_label("Max tokens").fill("400")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("region", name="Answer")).not_to_have_text("")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#answer-status")).to_contain_text("stopped after")
    server.wait_idle()
    expect(page.locator("#requests-summary")).to_have_text("none now")
    assert watched.told() == []


def test_what_cannot_be_served_is_told(watched: Watched) -> None:
    page = watched.page
    page.get_by_label("Prompt", exact=True).fill("No")
    page.get_by_label("Max tokens").fill("100000")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").filter(has_text="100000")).to_be_visible()
    assert watched.told(quiet=False) == []


def test_map_follows_requests(watched: Watched, server: RunningServer) -> None:
    page = watched.page
    prompt = "The same long beginning of every prompt, again and again. " * 4
    ends = threading.Event()

    def run() -> None:
        # Streams that stay open as long as the test looks.
        with server.client() as client:
            while not ends.is_set():
                with client.completions.create(
                    model="embedded", prompt=prompt, max_tokens=200, n=2, temperature=1.0,
                    stream=True, extra_body={"ignore_eos": True},
                ) as made:  # fmt: skip
                    for _ in made:
                        if ends.is_set():
                            break

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_for_cells(page, "shared")
        wait_for_cells(page, "live")
        expect(page.get_by_role("progressbar").first).to_have_attribute(
            "aria-valuenow", re.compile("[1-9]")
        )
        owner = page.get_by_role("listbox").get_by_role("option", name=re.compile("request cmpl"))
        expect(owner.first).to_be_attached()
        first = page.get_by_role("listbox").get_by_role("option").first
        expect(first).to_have_accessible_name(re.compile("request cmpl"))
        tokens = page.get_by_role("img", name="Tokens made")
        expect(tokens).to_have_accessible_name(re.compile(r"now [1-9]"))
        watched.shot("serving")
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    server.wait_idle()
    expect(page.locator(count_of(page, "live"))).to_have_text("0")
    page.wait_for_function("""() => ["kept", "stale"].some((state) =>
        document.querySelector(`#map-legend [data-state=${state}] b`).textContent !== "0")""")
    assert watched.told() == []
