"""Memory events of a run (addresses and bytes, in the order of time) become a trace."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bench.alloc_traces.trace_file import AllocTrace


class TraceBuilder:
    """Gives blocks ids and keeps the records; addresses are only names of blocks here.

    The lowest spare id is the next to be given, so that equal iterations have equal ids.
    """

    def __init__(self) -> None:
        self._records: list[tuple[int, int, int]] = []  # id, bytes or 0, stream
        self._live: dict[int, tuple[int, int]] = {}  # address -> id, stream
        self._spare: list[int] = []
        self._ids = 0
        self._starts: list[int] = []
        self._unknown = 0

    def request(self, address: int, size_bytes: int, stream: int = 0) -> None:
        """A block at an address.

        Raises:
            ValueError: no bytes, a stream that does not fit, or an address that is in use: events
                are missing or out of order, and the trace would be wrong.
        """
        if size_bytes < 1:
            raise ValueError(f"a request of {size_bytes} bytes at {address:#x}; record at least 1")
        if not 0 <= stream < 256:
            raise ValueError(f"stream {stream} does not fit in a trace; use at most 256 streams")
        if address in self._live:
            raise ValueError(
                f"event {len(self._records)} requests {size_bytes} bytes at {address:#x}, where a "
                "block is alive; a release is missing, so record all threads and all events"
            )
        if self._spare:
            block = heapq.heappop(self._spare)
        else:
            block, self._ids = self._ids, self._ids + 1
        self._live[address] = (block, stream)
        self._records.append((block, size_bytes, stream))

    def release(self, address: int) -> None:
        """The block at an address; one that was there before the recording is only counted."""
        found = self._live.pop(address, None)
        if found is None:
            self._unknown += 1
            return
        block, stream = found
        heapq.heappush(self._spare, block)
        self._records.append((block, 0, stream))

    def start_iteration(self) -> None:
        """What comes next belongs to a new iteration of the program."""
        self._starts.append(len(self._records))

    def build(self, name: str, meta: Mapping[str, Any]) -> AllocTrace:
        """The trace of all events so far.

        Args:
            name: of the trace.
            meta: what made it; ``iterations`` and ``releases_of_older_blocks`` are added.

        Raises:
            ValueError: there are no records.
        """
        if not self._records:
            raise ValueError(f"{name}: nothing was allocated while recording")
        blocks, sizes, streams = zip(*self._records, strict=True)
        counted = {
            "iterations": len(self._starts),
            "releases_of_older_blocks": self._unknown,
        }
        return AllocTrace(
            name=name,
            ids=np.array(blocks, np.uint32),
            sizes=np.array(sizes, np.uint64),
            streams=np.array(streams, np.uint8),
            steady_from=steady_start(self._starts, self._records),
            meta={**meta, **counted},
        ).validate()


def steady_start(starts: Sequence[int], records: Sequence[object]) -> int:
    """The record from which on all iterations are the same.

    Args:
        starts: first record of each iteration; the last one ends with the records.
        records: of the trace.

    Returns:
        The start of the first of at least two iterations that all equal the last one, -1 if the
        last two differ.
    """
    iterations = [records[start:end] for start, end in pairwise([*starts, len(records)])]
    steady = -1
    for start, iteration in reversed(list(zip(starts, iterations, strict=True))[:-1]):
        if iteration != iterations[-1]:
            break
        steady = start
    return steady
