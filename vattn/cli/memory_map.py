"""Draws a :class:`vattn.MemoryMap` in a terminal: one row per slot, one character per state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.text import Text

from vattn import MemoryMap, PageState, SlotMap
from vattn.config import format_bytes

States = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Mark:
    """How a state looks: a character that reads without colour, and a colour."""

    character: str
    ascii: str
    style: str
    meaning: str


MARKS: dict[PageState, Mark] = {
    PageState.LIVE: Mark("█", "#", "green", "live"),
    PageState.SHARED: Mark("▒", "=", "cyan", "shared"),
    PageState.COVER: Mark("░", "+", "yellow", "cover"),
    PageState.KEPT: Mark("o", "o", "blue", "kept"),
    PageState.STALE: Mark("x", "x", "magenta", "stale"),
    PageState.UNMAPPED: Mark("·", ".", "dim", "reserved only"),
}

# When as many pages of a column are in one state as in another, the one that is seen.
_PRECEDENCE = (
    PageState.SHARED,
    PageState.LIVE,
    PageState.COVER,
    PageState.KEPT,
    PageState.STALE,
)


def columns(regions: Sequence[States], width: int) -> list[PageState]:
    """The state shown in each of ``width`` columns over the token axis of a slot.

    Args:
        regions: per region ``[runs, pages_per_run]`` states; every run spans the whole slot.
        width: columns; a run with fewer pages is stretched, one with more is aggregated.

    Returns:
        Per column the commonest state of its mapped pages, over all runs and regions, and UNMAPPED
        where none is mapped.
    """
    if width <= 0:
        raise ValueError(f"width={width} must be positive")
    at = np.arange(width)
    counts = np.zeros((len(_PRECEDENCE), width), np.int64)
    for states in regions:
        pages = states.shape[1]
        first = at * pages // width
        last = np.maximum(first + 1, (at + 1) * pages // width)
        for row, state in enumerate(_PRECEDENCE):
            before = np.concatenate(([0], np.cumsum((states == state).sum(axis=0))))
            counts[row] += before[last] - before[first]
    commonest = counts.argmax(axis=0)  # the first of equals: _PRECEDENCE
    mapped = counts.sum(axis=0)
    return [_PRECEDENCE[commonest[at]] if mapped[at] else PageState.UNMAPPED for at in range(width)]


def render(
    memory: MemoryMap,
    *,
    width: int,
    labels: Sequence[str] = (),
    slot_tokens: int | None = None,
    plain_ascii: bool = False,
    max_rows: int = 64,
) -> Text:
    """The map as text, no line wider than ``width``.

    Args:
        memory: what to draw.
        width: columns of the terminal.
        labels: per region, what its layers are, such as ``"window 512"``. Regions with the same
            label share a row; slots get a row for each label. Empty for one row per slot.
        slot_tokens: tokens that a slot has addresses for, for the axis under the map.
        plain_ascii: for terminals without block characters.
        max_rows: slots beyond it are counted, not drawn.
    """
    names = list(dict.fromkeys(labels)) or [""]
    drawn = memory.slots[:max_rows]
    left = max((len(_head(slot, name)) for slot in drawn for name in names), default=0)
    right = max((len(_tail(slot)) for slot in drawn), default=0)
    bar = max(8, width - left - right - 4)
    edges = ("|", "|") if plain_ascii else ("▕", "▏")

    lines = []
    for slot in drawn:
        for name in names:
            regions = [
                states for i, states in enumerate(slot.regions) if not labels or labels[i] == name
            ]
            line = Text(_head(slot, name).ljust(left + 1), "" if slot.open else "dim")
            line.append(edges[0], "dim")
            line.append_text(_bar(columns(regions, bar), plain_ascii))
            line.append(edges[1], "dim")
            if name == names[0]:
                line.append(f" {_tail(slot)}", "" if slot.open else "dim")
            lines.append(line)
    hidden = len(memory.slots) - max_rows
    if hidden > 0:
        is_open = sum(slot.open for slot in memory.slots[max_rows:])
        lines.append(Text(f"and {hidden} more slots, {is_open} of them open", "dim"))
    if slot_tokens is not None:
        lines.append(_axis(slot_tokens, left + 2, bar))
    lines.append(_legend(plain_ascii))
    return Text("\n").join(lines)


def describe_column(memory: MemoryMap) -> str:
    """What a row of the map aggregates, in words."""
    shapes = [states.shape for slot in memory.slots[:1] for states in slot.regions]
    runs = sum(runs for runs, _ in shapes)
    pages = " or ".join(str(n) for n in sorted({pages for _, pages in shapes}))
    what = f"{runs} runs, drawn over each other, " if runs > 1 else "one run "
    return f"a slot is {what}of {pages} pages of {format_bytes(memory.page_bytes)}"


def _head(slot: SlotMap, name: str) -> str:
    return f"slot {slot.index} {name}".rstrip()


def _tail(slot: SlotMap) -> str:
    if slot.open:
        return f"{slot.tokens} tokens"
    return f"{slot.kept} kept" if slot.kept else "free"


def _bar(states: Sequence[PageState], plain_ascii: bool) -> Text:
    text = Text()
    for state in states:
        mark = MARKS[state]
        text.append(mark.ascii if plain_ascii else mark.character, mark.style)
    return text


def _axis(slot_tokens: int, indent: int, bar: int) -> Text:
    """Token numbers under the start, the middle and the end of the bars."""
    line = [" "] * (indent + bar)
    middle, last = str(slot_tokens // 2), f"{slot_tokens} tokens"
    places = [(indent, "token 0"), (indent + bar - len(last), last)]
    at = indent + bar // 2
    if at + len(middle) + 1 < places[1][0] and at > indent + len("token 0"):
        places.append((at, middle))
    for start, label in places:
        line[start : start + len(label)] = label
    return Text("".join(line).rstrip(), "dim")


def _legend(plain_ascii: bool) -> Text:
    text = Text()
    for i, mark in enumerate(MARKS.values()):
        text.append("   " if i else "")
        text.append(mark.ascii if plain_ascii else mark.character, mark.style)
        text.append(f" {mark.meaning}")
    return text
