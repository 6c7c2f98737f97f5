"""What PyTorch's memory page does with a snapshot, as strict as JavaScript is where it would stop.

Written from the behaviour of `torch/utils/viz/MemoryViz.js`: it annotates the events, then undoes
them one after the other from the last state ("Allocator State History"), and draws blocks inside of
segments at each step.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

# The opcodes that the page's unpickler knows.
_OPCODES = """
APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT EMPTY_LIST
EMPTY_TUPLE FRAME LIST LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE PROTO
SETITEM SETITEMS SHORT_BINUNICODE STOP TUPLE TUPLE1 TUPLE2 TUPLE3
"""
OPCODES = frozenset(_OPCODES.split())
EXACT = 2**53  # whole numbers beyond it are rounded


class PageStopped(Exception):
    """The page would raise an error."""


@dataclass
class Segment:
    addr: int
    size: int
    stream: int | None

    @property
    def end(self) -> int:
        return self.addr + self.size


def assert_unpickles(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        assert opcode.name in OPCODES, opcode.name
        assert opcode.name != "PROTO" or argument in (2, 3, 4)
        assert not isinstance(argument, int) or abs(argument) < EXACT


class Page:
    """The page with one device of a snapshot.

    Args:
        snapshot: is left as it is.
        device: its index.
        joins: whether mapped neighbours become one segment; versions of the page differ in whether
            this works on the default stream.
    """

    def __init__(self, snapshot: dict[str, Any], device: int, *, joins: bool) -> None:
        self._joins = joins
        events = snapshot["device_traces"][device]
        all_default = all(event["stream"] == 0 for event in events)
        self.events: list[dict[str, Any]] = []
        for event in events:
            known = {**event, "stream": None if all_default and not joins else event["stream"]}
            before = self.events[-1] if self.events else None
            if (
                known["action"] == "free_completed"
                and before is not None
                and before["action"] == "free_requested"
                and before["addr"] == known["addr"]
            ):
                before["action"] = "free"
                continue
            self.events.append(known)
        mine = [each for each in snapshot["segments"] if each["device"] == device]
        self.segments = sorted(
            (Segment(each["address"], each["total_size"], each["stream"]) for each in mine),
            key=lambda each: each.addr,
        )
        self.blocks: dict[int, int] = {}  # sizes
        for each in mine:
            at = each["address"]
            for block in each["blocks"]:
                if block["state"] in ("active_pending_free", "active_allocated"):
                    self.blocks[at] = block["size"]
                at += block["size"]

    def play_back(self) -> None:
        """Undoes all events, and draws after each.

        Raises:
            PageStopped: the page would stop there.
        """
        self.draw()
        while self.events:
            event = self.events.pop()
            self._undo(event)
            self.draw()

    def draw(self) -> int:
        """Puts each block into its segment; the bytes of segments."""
        for block in self.blocks:
            if not any(each.addr <= block < each.end for each in self.segments):
                raise PageStopped(f"block {block:#x} is in no segment")
        return sum(each.size for each in self.segments)

    def _undo(self, event: dict[str, Any]) -> None:
        action, addr = event["action"], event.get("addr", 0)
        if action == "free_requested":
            if addr not in self.blocks:
                raise PageStopped(f"free_requested of {addr:#x}, where no block is")
        elif action in ("free", "free_completed"):
            self.blocks[addr] = event["size"]
        elif action == "alloc":
            self.blocks.pop(addr, None)
        elif action == "segment_unmap":
            self._map(Segment(addr, event["size"], event["stream"]))
        elif action == "segment_map":
            self._unmap(Segment(addr, event["size"], event["stream"]))
        elif action != "oom":
            raise PageStopped(f"{action} is shown with an address that it has not")

    def _map(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.segments.sort(key=lambda each: each.addr)
        at = self.segments.index(segment)
        for first, second in ((at, at + 1), (at - 1, at)):
            if first < 0 or second >= len(self.segments):
                continue
            a, b = self.segments[first], self.segments[second]
            if a.end > b.addr:
                raise PageStopped(f"{b.addr:#x} is mapped twice")
            if self._joins and a.end == b.addr and a.stream == b.stream:
                a.size += b.size
                del self.segments[second]

    def _unmap(self, segment: Segment) -> None:
        around = [s for s in self.segments if s.addr <= segment.addr and segment.end <= s.end]
        if not around:
            raise PageStopped(f"{segment.addr:#x} is in no segment")
        self.segments.remove(around[0])
        for begin, end in ((around[0].addr, segment.addr), (segment.end, around[0].end)):
            if begin < end:
                self.segments.append(Segment(begin, end - begin, around[0].stream))
        self.segments.sort(key=lambda each: each.addr)
