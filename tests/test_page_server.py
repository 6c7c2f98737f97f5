"""The live page on a real server: a prompt is tried, and the map follows what the engine does."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page_fixtures import PATIENCE_MS, Watched, browser, watched_page
from tests.server_fixtures import RunningServer, server, server_of_session

__all__ = ["browser", "server", "server_of_session"]

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
def watched(browser: Browser, server: RunningServer) -> Iterator[Watched]:
    size = {"width": 1280, "height": 900}
    with watched_page(browser, server.url, viewport=size) as watched:
        expect(watched.page.locator("#connection")).to_have_text("live")
        expect(watched.page.locator("#model")).to_contain_text("embedded")
        yield watched


def count_of(page: Page, state: str) -> str:
    return f"#map-legend [data-state={state}] b"


def wait_for_cells(page: Page, state: str) -> None:
    expect(page.locator(count_of(page, state))).not_to_have_text("0")


def test_prompt_by_keyboard_grows_and_ends(watched: Watched) -> None:
    page = watched.page
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


def test_what_cannot_be_served_is_told(browser: Browser, server: RunningServer) -> None:
    with watched_page(browser, server.url, quiet=False) as watched:
        page = watched.page
        page.get_by_label("Prompt", exact=True).fill("No")
        page.get_by_label("Max tokens").fill("100000")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert").filter(has_text="100000")).to_be_visible()


def test_map_follows_requests(watched: Watched, server: RunningServer) -> None:
    page = watched.page
    prompt = "The same long beginning of every prompt, again and again. " * 4
    ends = threading.Event()

    def run() -> None:
        # Streams that stay open as long as the test looks; their readers are slow on purpose.
        with server.client() as client:
            while not ends.is_set():
                client.completions.create(
                    model="embedded", prompt=prompt, max_tokens=200, n=2, temperature=1.0,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip

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
        watched.shot("serving")
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    server.wait_idle()
    expect(page.locator(count_of(page, "live"))).to_have_text("0")
    page.wait_for_function("""() => ["kept", "stale"].some((state) =>
        document.querySelector(`#map-legend [data-state=${state}] b`).textContent !== "0")""")
