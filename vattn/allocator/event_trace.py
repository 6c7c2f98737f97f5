"""Records what programs ask an allocator for, to look at and to replay.

A recording keeps the last events and nothing else: it starts empty, and blocks that are live then
are only seen when they go.
"""

from __future__ import annotations

import heapq
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from vattn import _core
from vattn.allocator.which import allocator_of
from vattn.config import positive_int

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_EVENTS = 1_000_000  # of about 50 bytes each
_MOST_STREAMS = 256

Action = Literal[
    "alloc",
    "free_requested",
    "free_completed",
    "segment_map",
    "segment_unmap",
    "oom",
    "pause",
    "resume",
]


class Event(NamedTuple):
    """One thing that an allocator did.

    Attributes:
        action: ``alloc`` and ``free_requested`` are the program's calls, ``free_completed`` is when
            no stream uses a freed block any more. ``segment_map`` and ``segment_unmap`` give
            physical memory to addresses and take it away.
        address: of the block or the mapped stretch; 0 for an ``oom``, a ``pause`` and a ``resume``.
        bytes: as asked for, or of the stretch; for a ``pause`` what was live.
        stream: whose memory it is, as a ``CUstream``.
        time_us: microseconds since 1970.
        tag: its name; ``""`` for none.
    """

    action: Action
    address: int
    bytes: int
    stream: int
    time_us: int
    tag: str


@dataclass(frozen=True)
class Trace:
    """What was recorded.

    Args:
        events: the last ones, oldest first.
        dropped: how many before them were dropped, because there was no room for more.
    """

    events: tuple[Event, ...]
    dropped: int

    def save(self, path: str | os.PathLike[str], *, name: str) -> None:
        """Writes requests and releases as arrays that ``bench/allocator.py`` replays.

        The file is a zip of npy arrays that ``numpy.load`` opens. One record is a request or, with
        0 bytes, a release: ``ids`` uint32 ``[records]`` (which block; a number is taken again after
        its release), ``sizes`` uint64 (as asked for) and ``streams`` uint8 (numbered as they
        appear). ``about`` is JSON with ``name``, ``steady_from`` (-1) and ``meta``: ``dropped``
        as above, and ``unknown_releases``, of blocks that were allocated before the first event and
        are not in the file.

        Args:
            path: of the file, which is replaced; usually ``*.npz``.
            name: of the trace.

        Raises:
            ValueError: nothing was requested, or on more than 256 streams.
            OSError: the file cannot be written.
        """
        import numpy as np  # here: `vattn top` begins faster without it

        records, unknown = _records(self.events)
        if not records:
            raise ValueError("the trace has no request; record while the program allocates")
        ids, sizes, streams = zip(*records, strict=True)
        meta = {"source": "vattn", "dropped": self.dropped, "unknown_releases": unknown}
        about = {"name": name, "steady_from": -1, "meta": meta}
        arrays: dict[str, Any] = {
            "ids": np.array(ids, np.uint32),
            "sizes": np.array(sizes, np.uint64),
            "streams": np.array(streams, np.uint8),
            "about": np.array(json.dumps(about, sort_keys=True)),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
            for array_name, array in arrays.items():
                with file.open(f"{array_name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def record_trace(
    allocator: _core.CachingAllocator | None = None,
    *,
    device: str | torch.device | int | None = None,
    max_events: int = DEFAULT_MAX_EVENTS,
) -> None:
    """Begins to record, or ends it; what was recorded before is forgotten.

    Right after :func:`~vattn.allocator.enable` it records a program from its first request on; the
    device is opened for that.

    Args:
        allocator: whose events; None for that of ``device``.
        device: None for the current one.
        max_events: how many of the last events are kept, about 50 bytes each; 0 ends the recording.

    Raises:
        ValueError: ``max_events`` is no whole number or negative, or both an allocator and a device
            are given.
        RuntimeError: there is no such device, or neither ``enable()`` nor ``pool()`` has put an
            allocator on it.
        DriverError: no usable CUDA driver.
    """
    if max_events != 0:
        positive_int(max_events, "max_events", ", or 0 to end the recording")
    allocator_of(device, allocator, make=True).record(max_events)


def trace(
    allocator: _core.CachingAllocator | None = None,
    *,
    device: str | torch.device | int | None = None,
) -> Trace:
    """What was recorded so far. The recording goes on.

    Args:
        allocator: as for :func:`record_trace`.
        device: as for :func:`record_trace`.

    Raises:
        RuntimeError: there is no allocator on the device.
    """
    recorded, dropped = allocator_of(device, allocator).recorded()
    names: dict[int, str] = {}
    events = []
    for action, address, size, stream, time_us, tag in recorded:
        if tag not in names:
            names[tag] = _core.tag_name(tag)
        events.append(Event(cast(Action, action), address, size, stream, time_us, names[tag]))
    return Trace(tuple(events), dropped)


def save_trace(
    path: str | os.PathLike[str],
    allocator: _core.CachingAllocator | None = None,
    *,
    device: str | torch.device | int | None = None,
    name: str | None = None,
) -> None:
    """Writes what was recorded so far to a file; see :meth:`Trace.save`.

    Args:
        path: of the file.
        allocator: as for :func:`record_trace`.
        device: as for :func:`record_trace`.
        name: of the trace; None for the file's name without its suffix.

    Raises:
        RuntimeError: there is no allocator on the device.
        ValueError: nothing was requested, or on more than 256 streams.
        OSError: the file cannot be written.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    trace(allocator, device=device).save(path, name=name or stem)


def _records(events: tuple[Event, ...]) -> tuple[list[tuple[int, int, int]], int]:
    """``(id, bytes, stream)`` of each request and release, and how many releases were unknown."""
    records: list[tuple[int, int, int]] = []
    live: dict[int, tuple[int, int]] = {}  # by address: id and stream
    free_ids: list[int] = []
    streams: dict[int, int] = {}
    unknown = 0
    for event in _calls(events):
        if event.action == "alloc":
            stream = streams.setdefault(event.stream, len(streams))
            block = heapq.heappop(free_ids) if free_ids else len(live)
            live[event.address] = block, stream
            records.append((block, event.bytes, stream))
        elif event.address in live:
            block, stream = live.pop(event.address)
            heapq.heappush(free_ids, block)
            records.append((block, 0, stream))
        else:
            unknown += 1
    if len(streams) > _MOST_STREAMS:
        raise ValueError(
            f"the trace has {len(streams)} streams and the file numbers {_MOST_STREAMS}; record a "
            "program with fewer"
        )
    return records, unknown


def _calls(events: tuple[Event, ...]) -> Iterator[Event]:
    return (event for event in events if event.action in ("alloc", "free_requested"))
