"""The drawing of a memory map: which state a column shows, and what fits a terminal."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import vattn
from vattn import KVCache, MemoryMap, PageState, SlotMap
from vattn.cli.memory_map import MARKS, columns, describe_column, render

LIVE, SHARED, COVER, STALE, UNMAPPED = (
    PageState.LIVE,
    PageState.SHARED,
    PageState.COVER,
    PageState.STALE,
    PageState.UNMAPPED,
)


def states(*rows: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Runs written with the characters of the map: `#` live, `=` shared, `+` cover, `x` stale."""
    of = {mark.ascii: state for state, mark in MARKS.items()}
    return np.array([[of[c] for c in row] for row in rows], np.uint8)


def slot(index: int, *rows: str, tokens: int = 0, regions: int = 1) -> SlotMap:
    return SlotMap(index, tokens > 0, tokens, (states(*rows),) * regions)


def drawn(regions: tuple[str, ...], width: int) -> str:
    return "".join(MARKS[state].ascii for state in columns([states(*regions)], width))


def test_one_page_per_column() -> None:
    assert drawn(("==##+x..",), 8) == "==##+x.."


def test_few_pages_are_stretched_and_keep_their_order() -> None:
    assert drawn(("=#.",), 9) == "===###..."
    assert drawn(("=#.",), 10) == "====###..."


def test_many_pages_are_aggregated_to_the_commonest_mapped_state() -> None:
    assert drawn(("####....",), 4) == "##.."
    # One live page in an otherwise unmapped column shows: mapped memory is what the map is about.
    assert drawn(("#.......",), 2) == "#."
    assert drawn(("##x+++..",), 2) == "#+"


def test_runs_are_drawn_over_each_other() -> None:
    assert drawn(("##..", "##+.", "##+."), 4) == "##+."
    assert drawn(("x...", "#..."), 4) == "#..."  # of equals the one that is used


def test_regions_of_different_lengths_share_the_axis() -> None:
    got = columns([states("##......"), states("#...")], 8)
    assert "".join(MARKS[s].ascii for s in got) == "##......"


@pytest.mark.parametrize("pages", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize("width", [1, 8, 61, 200])
def test_every_page_is_in_a_column(pages: int, width: int) -> None:
    for page in (0, pages // 2, pages - 1):
        row = np.zeros((1, pages), np.uint8)
        row[0, page] = LIVE
        assert LIVE in columns([row], width)


def test_no_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="width=0 must be positive"):
        columns([states("#")], 0)


def test_characters_tell_states_apart_without_colour() -> None:
    for characters in ([m.character for m in MARKS.values()], [m.ascii for m in MARKS.values()]):
        assert len(set(characters)) == len(MARKS) == len(PageState)
    assert len({mark.style for mark in MARKS.values()}) == len(MARKS)
    assert all(mark.ascii.isascii() for mark in MARKS.values())


def test_rendered_map_has_a_row_per_slot_an_axis_and_a_legend() -> None:
    memory = MemoryMap(
        4096, (slot(0, "==##....", tokens=120), slot(1, "==#.....", tokens=77), slot(2, "xx......"))
    )
    lines = render(memory, width=60, slot_tokens=256, plain_ascii=True).plain.splitlines()
    assert lines[0].startswith("slot 0 |===")
    assert lines[0].endswith("| 120 tokens")
    assert lines[1].endswith("| 77 tokens")
    assert lines[2].endswith("| free")
    assert "x" in lines[2] and "#" not in lines[2]  # noqa: PT018
    assert lines[3].split() == ["token", "0", "128", "256", "tokens"]
    for mark in MARKS.values():
        assert f"{mark.ascii} {mark.meaning}" in lines[4]
    assert len(lines) == 5


@pytest.mark.parametrize("width", [40, 80, 200])
def test_rendered_map_fits_the_terminal(width: int) -> None:
    memory = MemoryMap(16384, tuple(slot(i, "=#+." * 100, tokens=999) for i in range(12)))
    text = render(memory, width=width, slot_tokens=2048)
    assert max(len(line) for line in text.plain.splitlines()[:-1]) == width
    assert width < 60 or max(len(line) for line in text.plain.splitlines()) <= width


def test_colour_is_beside_the_character() -> None:
    memory = MemoryMap(4096, (slot(0, "=#+x", tokens=9),))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard")
    console.print(render(memory, width=80))
    text = out.getvalue()
    for state in (LIVE, SHARED, COVER, STALE):
        code = {"green": 32, "cyan": 36, "yellow": 33, "magenta": 35}[MARKS[state].style]
        assert f"\x1b[{code}m{MARKS[state].character}" in text


def test_regions_with_labels_get_rows_of_their_own() -> None:
    memory = MemoryMap(4096, (SlotMap(0, True, 50, (states("####"), states("..##"))),))
    labels = ("full", "window 16")
    lines = render(memory, width=40, labels=labels, plain_ascii=True).plain.splitlines()
    assert lines[0].startswith("slot 0 full      |####")
    assert lines[1].startswith("slot 0 window 16 |....")
    assert lines[0].endswith("50 tokens")
    assert not lines[1].endswith("50 tokens")


def test_many_slots_are_counted() -> None:
    memory = MemoryMap(4096, tuple(slot(i, "#.", tokens=5 * (i < 9)) for i in range(12)))
    lines = render(memory, width=40, max_rows=8).plain.splitlines()
    assert lines[8] == "and 4 more slots, 1 of them open"


def test_map_of_a_real_cache() -> None:
    """A fork shares full pages, a released slot is stale, and the rest is reserved only."""
    sizes: Any = {"page_bytes": 4096, "max_seqs": 3, "max_tokens": 256}
    with KVCache(1, 1, 16, torch.float32, **sizes, order="token", strict=True) as cache:
        assert cache.layout.regions[0].token_bytes == 128  # 32 tokens in a page
        first = cache.open()
        cache.ensure(first, 96)
        second = cache.fork(first, 64)
        cache.ensure(second, 70)
        third = cache.open()
        cache.ensure(third, 32)
        cache.release(third)
        memory = cache.memory_map()
        text = render(memory, width=80, slot_tokens=256, plain_ascii=True).plain
    rows = {line.split("|")[0].strip(): line.split("|")[1] for line in text.splitlines()[:3]}
    pattern = {
        name: "".join(c for c, after in zip(row, f"{row[1:]} ", strict=True) if c != after)
        for name, row in rows.items()
    }
    assert pattern == {f"slot {int(first)}": "=#.", f"slot {int(second)}": "=#.", "slot 2": "x."}
    assert describe_column(memory) == "a slot is one run of 8 pages of 4.0 KiB"


def test_description_counts_runs() -> None:
    memory = vattn.MemoryMap(16384, (slot(0, "#.", "#.", regions=3),))
    assert (
        describe_column(memory) == "a slot is 6 runs, drawn over each other, of 2 pages of 16.0 KiB"
    )
