"""Events of an allocator in a form that PyTorch's memory page can play backwards.

The page (``torch/utils/viz/MemoryViz.js``) starts from the last state and undoes one event after
the other. It takes every event at its word: one that does not fit, such as memory unmapped that was
not mapped, or a block outside of every segment, stops it. Ours need not fit as they are. An address
may be mapped for a second time or lose its pages without an event, since pages move between
addresses and a pause takes them all away; and the oldest events may have been dropped. So what the
page will do is done here first, and events are cut, left out or added until all of them fit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Entry = dict[str, Any]  # of torch's `device_traces`
_BLOCK = 512  # sizes of blocks are rounded up to it


def playable(events: Sequence[Entry], segments: Iterable[Entry]) -> list[Entry]:
    """The events, changed so that they lead to the segments and every step back is possible.

    Args:
        events: oldest first, in torch's form. Actions other than of blocks and of segments stay.
        segments: the state after the last one, in torch's form.

    Returns:
        New events, oldest first.
    """
    state = _State(segments)
    undone: list[Entry] = []
    for event in reversed(events):
        undone += state.undo(event)
    return undone[::-1]


class _State:
    """Which addresses are mapped and which blocks are in use, at some moment."""

    def __init__(self, segments: Iterable[Entry]) -> None:
        self._sizes: dict[int, int] = {}  # of blocks in use, by address
        self._blocks: list[int] = []  # their addresses, sorted
        # Mapped stretches, sorted. Those that touch are not joined: versions of the page differ in
        # that, and a stretch of ours lies in one of theirs either way.
        self._begins: list[int] = []
        self._ends: list[int] = []
        for segment in segments:
            self._map(segment["address"], segment["address"] + segment["total_size"])
            for block in segment["blocks"]:
                if block["state"] != "inactive":
                    self._add_block(block["address"], block["size"])

    def undo(self, event: Entry) -> Iterator[Entry]:
        """Steps back over an event; what it has to be for that, the last one first."""
        action = event["action"]
        if action == "segment_unmap":
            for begin, end in self._map(event["addr"], event["addr"] + event["size"]):
                yield {**event, "addr": begin, "size": end - begin}
        elif action == "segment_map":
            for begin, end in self._unmap(event["addr"], event["addr"] + event["size"]):
                yield {**event, "addr": begin, "size": end - begin}
        elif action == "free_completed":
            yield from self._undo_free(event)
        elif action == "alloc":
            if self._remove_block(event["addr"]):
                yield event
        elif action != "free_requested" or event["addr"] in self._sizes:
            yield event

    def _undo_free(self, event: Entry) -> Iterator[Entry]:
        address = event["addr"]
        if address in self._sizes:
            return
        size = -(-event["size"] // _BLOCK) * _BLOCK
        # A block was mapped while it was in use: what is not mapped now was unmapped since.
        for begin, end in self._map(address, address + size):
            yield {**event, "action": "segment_unmap", "addr": begin, "size": end - begin}
        self._add_block(address, size)
        yield event

    # Blocks -----------------------------------------------------------------------------------

    def _add_block(self, address: int, size: int) -> None:
        self._sizes[address] = size
        insort(self._blocks, address)

    def _remove_block(self, address: int) -> bool:
        if self._sizes.pop(address, None) is None:
            return False
        del self._blocks[bisect_left(self._blocks, address)]
        return True

    def _without_blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a stretch that no block uses."""
        at = max(0, bisect_right(self._blocks, begin) - 1)
        while at < len(self._blocks) and self._blocks[at] < end:
            block = self._blocks[at]
            if begin < block:
                yield begin, block
            begin = max(begin, block + self._sizes[block])
            at += 1
        if begin < end:
            yield begin, end

    # Mapped stretches -------------------------------------------------------------------------

    def _map(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Maps what is not mapped; the new stretches."""
        new = []
        at = bisect_right(self._ends, begin)
        while begin < end:
            until = min(end, self._begins[at]) if at < len(self._begins) else end
            if begin < until:
                new.append((begin, until))
            begin = max(until, self._ends[at]) if at < len(self._ends) else end
            at += 1
        for first, last in new:
            place = bisect_left(self._begins, first)
            self._begins.insert(place, first)
            self._ends.insert(place, last)
        return new

    def _unmap(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Unmaps what is mapped and in no block; the stretches, each in one that was mapped."""
        at = bisect_right(self._ends, begin)
        gone: list[tuple[int, int]] = []
        while at < len(self._begins) and self._begins[at] < end:
            first, last = self._begins[at], self._ends[at]
            pieces = list(self._without_blocks(max(begin, first), min(end, last)))
            left = list(_between(first, last, pieces))
            self._begins[at : at + 1] = [a for a, _ in left]
            self._ends[at : at + 1] = [b for _, b in left]
            gone += pieces
            at += len(left)
        return gone


def _between(begin: int, end: int, pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is left of a stretch without pieces of it, which are in order."""
    for first, last in pieces:
        if begin < first:
            yield begin, first
        begin = last
    if begin < end:
        yield begin, end
