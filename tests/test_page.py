"""The live page in a browser: drawing, keyboard, words for screen readers, keys, lost streams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.page_fixtures import PATIENCE_MS, Watched, browser, watched_page
from tests.page_stub import Stub, snapshot, stub_server
from vattn.server.page.page import page_files
from vattn.server.settings import ServerSettings

__all__ = ["browser"]

CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
SLOTS = ["0", "1", "2", "9", "5", "6"]  # those in use first
SIZE: Any = {"width": 1280, "height": 900}

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def stub_of_module() -> Iterator[Stub]:
    with stub_server() as stub:
        yield stub


@pytest.fixture
def stub(stub_of_module: Stub) -> Stub:
    stub = stub_of_module
    stub.snapshot, stub.key, stub.refuse = snapshot(), "", None
    return stub


@pytest.fixture(scope="module")
def watched_of_module(browser: Browser, stub_of_module: Stub) -> Iterator[Watched]:
    with watched_page(browser, stub_of_module.url, viewport=SIZE) as watched:
        yield watched


@pytest.fixture
def loud(watched_of_module: Watched, stub: Stub) -> Iterator[Page]:
    """The module's page as if it had just been opened; the test may make its requests fail."""
    page = watched_of_module.page
    page.set_viewport_size(SIZE)
    page.mouse.move(0, 0)
    # Two names by turns: when the other one is there, so is all of this test's snapshot.
    stub.snapshot["model"] = "stub B" if "stub A" in page.inner_text("#model") else "stub A"
    expect(page.locator("#model")).to_contain_text(stub.snapshot["model"])
    is_live(page)
    yield page
    assert watched_of_module.told(quiet=False) == []


@pytest.fixture
def page(loud: Page, watched_of_module: Watched) -> Iterator[Page]:
    """The same for tests during which nothing may fail."""
    yield loud
    assert watched_of_module.told() == []


def is_live(page: Page, words: str = "live") -> None:
    expect(page.locator("#connection")).to_have_text(words)


def rows_of(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Virtual address space").get_by_role("option")


# Files --------------------------------------------------------------------------------------------


def test_files_have_types_and_a_policy_and_are_kept(stub: Stub) -> None:
    with httpx.Client(base_url=stub.url) as client:
        document = client.get("/")
        assert document.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in document.headers["content-security-policy"]
        assert "unsafe" not in document.headers["content-security-policy"]
        named = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', document.text))
        assert named == {"/page/page.css", "/page/page.js", "/page/icon.svg"}
        for name in page_files():
            first = client.get(f"/page/{name}")
            assert first.status_code == 200
            assert first.headers["x-content-type-options"] == "nosniff"
            again = client.get(f"/page/{name}", headers={"If-None-Match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            other = client.get(f"/page/{name}", headers={"If-None-Match": '"other"'})
            assert other.content == first.content
        assert client.head("/").headers["content-length"] == str(len(document.content))


def test_there_is_nothing_else_to_get(stub: Stub) -> None:
    with httpx.Client(base_url=stub.url) as client:
        for name in ("page.py", "__init__.py", "none.js", "..%2Fstate.py"):
            assert client.get(f"/page/{name}").status_code == 404


def test_the_page_can_be_off(stub: Stub) -> None:
    state = stub.app.state.vattn
    state.settings = ServerSettings(page=False)
    try:
        assert httpx.get(stub.url).status_code == 404
        assert httpx.get(f"{stub.url}page/page.css").status_code == 404
    finally:
        state.settings = stub.settings


def test_scripts_and_styles_are_nowhere_inline() -> None:
    document = page_files()["index.html"].body.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|https?://", document)
    for name, file in page_files().items():
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|\beval\b", file.body.decode())


# What it shows ------------------------------------------------------------------------------------


def test_landmarks_headings_and_figures(page: Page) -> None:
    for name in ("banner", "main"):
        expect(page.get_by_role(name)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_text("vattn")
    for name in ("Physical memory", "Virtual address space", "Try a prompt", "Requests"):
        expect(page.get_by_role("region", name=name).first).to_be_visible()
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    expect(page.locator("#pool-summary")).to_contain_text("45 MiB exist, 70.3% of a budget")
    expect(page.locator("#driver-line")).to_contain_text("120 remaps avoided")
    chart = page.get_by_role("img", name="Tokens made")
    expect(chart).to_have_accessible_name(re.compile(r"now \d+ /s, peak .* two minutes"))
    assert len(chart.locator("path.first").get_attribute("d") or "") > 200
    bar = page.get_by_role("progressbar", name="cmpl-7f3a90")
    assert [bar.get_attribute(f"aria-value{key}") for key in ("now", "max", "text")] == [
        "102", "256", "102 of 256 tokens",
    ]  # fmt: skip
    waiting = page.get_by_role("row", name="cmpl-waiting")
    expect(waiting.get_by_role("cell").first).to_have_text("waiting × 2")
    expect(waiting.get_by_role("progressbar")).to_have_attribute("aria-valuemax", "512")


def test_little_memory_is_not_none(page: Page, stub: Stub) -> None:
    stub.snapshot["memory"]["budget_bytes"] = 1 << 40
    expect(page.locator("#pool-summary")).to_contain_text("45 MiB exist, <0.1% of a budget")


def test_text_of_the_server_stays_text(page: Page, stub: Stub) -> None:
    stub.snapshot["model"] = "<b>model</b>"
    expect(page.locator("#model")).to_contain_text("<b>model</b>")
    expect(page.get_by_role("row", name="<img src=x")).to_be_visible()
    assert page.locator("img, b:text('model')").count() == 0


def test_map_has_rows_for_mapped_slots_in_words(page: Page) -> None:
    rows = rows_of(page)
    expect(rows).to_have_count(len(SLOTS))
    expect(rows.first).to_have_accessible_name(
        "Slot 0: request cmpl-7f3a90; 410 of 512 tokens; "
        "cells: 9 live, 16 shared, 1 cover, 9 of them recycled"
    )
    expect(rows).to_have_text(
        ["0 · 7f3a90", "1 · 7f3a91", "2 · 04", "9 · <img src=…", "5 · kept", "6 · free"]
    )
    expect(page.locator("#map-summary")).to_contain_text("6 of 64 slots mapped, 4 of them in use")
    rows.nth(4).hover()
    expect(page.locator("#map-detail")).to_contain_text("Slot 5: free, remembers a prefix")
    legend = page.get_by_role("list", name="Cells by state")
    counts = {"live": 19, "shared": 32, "cover": 3, "kept": 8, "stale": 5, "recycled": 13}
    for name, n in counts.items():
        expect(legend.locator(f"[data-state={name}] b")).to_have_text(str(n))


def test_map_is_drawn_in_the_colours_of_its_legend(browser: Browser, stub: Stub) -> None:
    look = """([row, cell]) => {
        const canvas = document.getElementById("map-canvas");
        const wide = canvas.width / 32, high = devicePixelRatio *
            document.getElementById("slot-0").getBoundingClientRect().height;
        const pixels = canvas.getContext("2d").getImageData(
            cell * wide + 1, row * high + 3, wide - 3, high - 8).data;
        const found = new Set();
        for (let i = 0; i < pixels.length; i += 4) found.add(pixels.slice(i, i + 3).join());
        return [...found];
    }"""
    swatch = """name => getComputedStyle(
        document.querySelector(`#map-legend i.${name}`)).borderTopColor.match(/\\d+/g).join()"""
    with watched_page(browser, stub.url, device_scale_factor=2) as watched:
        page = watched.page
        expect(rows_of(page)).to_have_count(len(SLOTS))
        cells = {
            "live": [2, 3],
            "shared": [0, 5],
            "cover": [0, 25],
            "kept": [4, 4],
            "stale": [5, 3],
        }
        page.wait_for_function(f"([at, name]) => ({look})(at).includes(({swatch})(name))",
                               arg=[cells["live"], "live"])  # fmt: skip
        for name, at in cells.items():
            assert page.evaluate(swatch, name) in page.evaluate(look, at), name
        assert len(page.evaluate(look, [2, 20])) == 1, "reserved cells are plain"
        # States differ by more than colour: all but live have a pattern.
        assert len(page.evaluate(look, cells["live"])) < len(page.evaluate(look, cells["shared"]))


def test_map_by_keyboard_and_as_a_table(page: Page) -> None:
    rows = page.get_by_role("listbox")
    button = page.get_by_role("button", name="Show as table")
    button.focus()
    page.keyboard.press("Tab")
    expect(rows).to_be_focused()
    steps = [("", "0"), ("ArrowDown", "1"), ("End", "6"), ("ArrowUp", "5"), ("Home", "0")]
    for key, slot in steps:
        if key:
            page.keyboard.press(key)
        expect(rows).to_have_attribute("aria-activedescendant", f"slot-{slot}")
        expect(rows_of(page).and_(page.get_by_role("option", selected=True))).to_have_id(
            f"slot-{slot}"
        )
        expect(page.locator("#map-detail")).to_contain_text(f"Slot {slot}:")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    table = page.get_by_role("region", name="Slots as a table")
    expect(table.get_by_role("rowheader")).to_have_text(SLOTS)
    cells = table.get_by_role("row").nth(1).get_by_role("cell")
    expect(cells).to_have_text(["cmpl-7f3a90", "410", "0", "9", "16", "1", "0", "0", "9"])
    expect(rows).to_be_hidden()
    page.keyboard.press("Enter")
    expect(rows).to_be_visible()


def test_many_rows_scroll_below_those_in_use(page: Page, stub: Stub) -> None:
    shown = stub.snapshot["map"]
    kept, busy = shown["rows"][3], shown["rows"][2]
    shown["rows"] = [{**kept, "slot": i} for i in range(200)] + [{**busy, "slot": 200}]
    expect(rows_of(page)).to_have_count(201)
    expect(rows_of(page).first).to_have_id("slot-200")
    page.get_by_role("listbox").focus()
    page.keyboard.press("End")
    expect(page.locator("#slot-199")).to_be_in_viewport()
    assert page.evaluate("document.getElementById('map-canvas').clientHeight") < 600


# People -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_pictures(page: Page, watched_of_module: Watched, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert page.evaluate(CHECKS) == []
    watched_of_module.shot(scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    theme = page.get_by_label("Theme")
    theme.select_option(other)
    assert page.evaluate(CHECKS) == []
    page.reload()
    assert theme.input_value() == other
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == other
    theme.select_option("auto")


@pytest.mark.parametrize(("name", "width"), [("narrow", 360), ("zoomed", 640)])
def test_small_windows_do_not_scroll_sideways(
    page: Page, watched_of_module: Watched, name: str, width: int
) -> None:
    # A window of 1280 pixels at 200% has 640 of the page's.
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    watched_of_module.shot(name)


def test_less_motion_where_it_is_asked_for(page: Page) -> None:
    look = "getComputedStyle(document.querySelector('#pool-bar i')).transitionDuration"
    motions: Any = {"reduce": "0s", "no-preference": "0.2s"}
    for motion, duration in motions.items():
        page.emulate_media(reduced_motion=motion)
        assert page.evaluate(look) == duration


def test_polite_regions_do_not_chatter(page: Page, stub: Stub) -> None:
    page.evaluate("""() => {
        window.said = 0;
        for (const each of document.querySelectorAll("[role=status], [role=alert]")) {
            new MutationObserver(() => (window.said += 1)).observe(
                each, {childList: true, characterData: true, subtree: true});
        }
    }""")
    stub.snapshot["queue"]["running"] = 77
    stub.snapshot["requests"][0]["output_tokens"] = [200]
    expect(page.get_by_role("progressbar").first).to_have_attribute("aria-valuenow", "200")
    assert page.evaluate("window.said") == 0


# Keys, errors, lost streams -----------------------------------------------------------------------


def test_key_is_asked_for_and_kept_in_the_tab(browser: Browser, stub: Stub) -> None:
    stub.key = "secret"
    with watched_page(browser, stub.url, quiet=False) as watched:
        page = watched.page
        is_live(page, "a key is needed")
        field = page.get_by_label("This server asks for a key")
        expect(field).to_be_focused()
        for wrong, why in (("wrong", "the key is wrong"), ("日本", "made of ASCII")):
            page.keyboard.type(wrong)
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert").filter(has_text=why)).to_be_visible()
        field.fill("secret")
        watched.shot("key")
        page.keyboard.press("Enter")
        is_live(page)
        expect(field).to_be_hidden()
        expect(page.get_by_role("main")).to_be_focused()
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert page.evaluate("Object.values(localStorage).includes('secret')") is False
        assert "secret" not in page.url
        page.reload()
        is_live(page)
        expect(rows_of(page)).to_have_count(len(SLOTS))
        page.get_by_role("button", name="Forget key").click()
        expect(field).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        # Nothing stays of what the key had let in.
        for left in ("#map-rows li", "#requests-body tr", "#pool-legend li"):
            expect(page.locator(left)).to_have_count(0)
        expect(page.locator("#model")).to_have_text("")


def test_reconnects_when_the_stream_is_cut(loud: Page, stub: Stub) -> None:
    stub.refuse, stub.cut = 503, stub.streams
    is_live(loud, "reconnecting: too many viewers")
    stub.snapshot["model"] = "another"
    stub.refuse = None
    is_live(loud)
    expect(loud.locator("#model")).to_contain_text("another")


def test_failures_of_the_page_itself_are_told(loud: Page, stub: Stub) -> None:
    stub.snapshot["engine"] = None
    expect(loud.locator("#connection")).to_contain_text("reconnecting: Cannot")
    stub.snapshot = snapshot()
    is_live(loud)


def test_engine_restarts(page: Page, stub: Stub) -> None:
    stub.snapshot["engine"] |= {"state": "restarting", "error": "killed"}
    stub.snapshot |= {"memory": None, "driver": None, "map": None, "requests": []}
    is_live(page, "engine restarting: killed")
    expect(rows_of(page)).to_have_count(0)
    expect(page.locator("#map-summary")).to_contain_text("not known")
    expect(page.locator("#requests-summary")).to_have_text("none now")
    stub.snapshot = snapshot()
    is_live(page)
    expect(rows_of(page)).to_have_count(len(SLOTS))


def test_errors_of_the_server_are_shown(loud: Page) -> None:
    loud.get_by_label("Prompt", exact=True).fill("<i>no</i>")
    loud.get_by_role("button", name="Send").click()
    alert = loud.get_by_role("alert").filter(has_text="refused")
    expect(alert).to_have_text("prompt '<i>no</i>' is refused (try again in 3 s)")
    expect(loud.get_by_role("button", name="Send")).to_be_enabled()
