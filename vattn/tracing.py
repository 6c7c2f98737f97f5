"""Writes event traces that ``chrome://tracing`` and https://ui.perfetto.dev open; no torch here.

The file is the JSON object form of Chrome's trace event format. Times are nanoseconds of
CLOCK_MONOTONIC, as of ``time.perf_counter_ns``, until they are written: as microseconds since the
trace began.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import IO, Any, NamedTuple

from vattn.config import positive_int

_log = logging.getLogger(__name__)

DEFAULT_MAX_EVENTS = 1_000_000
Args = Mapping[str, Any]


@dataclass(frozen=True)
class TraceSummary:
    """What a trace has become.

    Args:
        path: of the file.
        events: in it, as entries of ``traceEvents``.
        dropped_events: of the engine, that there was no room for: the oldest ones.
        dropped_calls: of the driver, likewise.
    """

    path: Path
    events: int
    dropped_events: int
    dropped_calls: int


class _Event(NamedTuple):
    """What is kept until the file is written; phases are those of the format.

    ``"life"`` and ``"flow"`` become several entries that are of no use without each other.
    """

    phase: str
    name: str
    category: str
    thread: int
    begin_ns: int
    end_ns: int
    args: Any


class Trace:
    """The last events of a program, and the file that they are for.

    One thread adds events, that of the engine; what other threads did comes by
    :func:`driver_events`.

    Args:
        path: of the file, which is replaced; compressed if it ends in ``.gz``.
        max_events: how many events to keep.

    Raises:
        ValueError: the file cannot be written, or a number that is not positive.
    """

    def __init__(self, path: str | os.PathLike[str], max_events: int) -> None:
        self.path = Path(path)
        self._events: deque[_Event] = deque(maxlen=positive_int(max_events, "max_events"))
        self._added = 0
        self._threads: dict[int, str] = {}
        self._next_id = 0
        self._file = _open(self.path)
        self.start_ns = perf_counter_ns()

    def slice(
        self, name: str, begin_ns: int, end_ns: int, args: Args | None = None, *, thread: int = 0
    ) -> None:
        """Something that a thread did; 0 is the calling one."""
        self._add("X", name, "engine", thread, begin_ns, end_ns, args)

    def instant(self, name: str, args: Args | None = None) -> None:
        """Something that has just happened."""
        now = perf_counter_ns()
        self._add("i", name, "engine", 0, now, now, args)

    def counter(self, name: str, values: Mapping[str, int]) -> None:
        """Figures of this moment, which are drawn on top of each other."""
        now = perf_counter_ns()
        self._add("C", name, "engine", 0, now, now, values)

    def life(self, name: str, phases: Sequence[tuple[str, int, int]], args: Args) -> None:
        """What became of something that threads share: named phases, each with begin and end."""
        begins, ends = [begin for _, begin, _ in phases], [end for *_, end in phases]
        self._add("life", name, "request", 0, min(begins), max(ends), (phases, args))

    def flow(self, name: str, source: tuple[int, int], begin_ns: int) -> None:
        """An arrow from the slice at ``source``, thread and time, to the calling thread's."""
        self._add("flow", name, "flow", 0, source[1], begin_ns, source[0])

    def name_thread(self, name: str, thread: int = 0) -> None:
        """What a track is called; 0 is the calling thread's. The first name stays."""
        self._threads.setdefault(thread or threading.get_native_id(), name)

    def _add(
        self,
        phase: str,
        name: str,
        category: str,
        thread: int,
        begin_ns: int,
        end_ns: int,
        args: Any,
    ) -> None:
        thread = thread or threading.get_native_id()
        self._added += 1
        self._events.append(_Event(phase, name, category, thread, begin_ns, end_ns, args))

    def close(self) -> None:
        """Gives the file up; it stays empty."""
        self._file.close()

    def write(
        self,
        calls: Iterable[_Event] = (),
        others: Sequence[Mapping[str, Any]] = (),
        *,
        dropped_calls: int = 0,
        about: Args | None = None,
    ) -> TraceSummary:
        """Writes the file and closes it.

        Args:
            calls: of drivers, see :func:`driver_events`.
            others: entries of ``traceEvents`` from elsewhere, on the same axis of time.
            dropped_calls: how many calls are missing.
            about: for the file's ``otherData``.

        Raises:
            OSError: the disk is full, or the like.
        """
        dropped = self._added - len(self._events)
        told = {**(about or {}), "dropped_events": dropped, "dropped_calls": dropped_calls}
        told["clock"] = "microseconds since start_ns of CLOCK_MONOTONIC"
        told["start_ns"] = self.start_ns
        written = 0
        with self._file as file:
            events = sorted([*self._events, *calls], key=lambda e: (e.begin_ns, -e.end_ns))
            file.write('{"displayTimeUnit": "ms", "otherData": ' + json.dumps(told))
            file.write(', "traceEvents": [\n')
            for entry in self._entries(events, others, dropped + dropped_calls):
                file.write(",\n" if written else "")
                file.write(json.dumps(entry, separators=(",", ":")))
                written += 1
            file.write("\n]}\n")
        if dropped or dropped_calls:
            _log.warning(
                "%s: the oldest %d events and %d driver calls are missing; raise max_events",
                self.path,
                dropped,
                dropped_calls,
            )
        return TraceSummary(self.path, written, dropped, dropped_calls)

    def _entries(
        self, events: Sequence[_Event], others: Sequence[Mapping[str, Any]], dropped: int
    ) -> Iterator[Mapping[str, Any]]:
        yield _metadata("process_name", os.getpid(), 0, {"name": "vattn"})
        yield _metadata("process_sort_index", os.getpid(), 0, {"sort_index": -1})
        for thread in sorted({event.thread for event in events}):
            name = self._threads.get(thread) or _thread_name(thread)
            yield _metadata("thread_name", os.getpid(), thread, {"name": name})
            order = list(self._threads).index(thread) if thread in self._threads else 99
            yield _metadata("thread_sort_index", os.getpid(), thread, {"sort_index": order})
        if dropped:
            name = f"{dropped} events before are missing; raise max_events"
            yield {**_at("i", name, "trace", 0, 0.0), "s": "g"}
        for event in events:
            yield from self._rendered(event)
        yield from others

    def _us(self, time_ns: int) -> float:
        return max(0, time_ns - self.start_ns) / 1000

    def _rendered(self, event: _Event) -> Iterator[dict[str, Any]]:
        """The entries of an event. What began before the trace begins with it."""
        begin, end = self._us(event.begin_ns), self._us(event.end_ns)
        entry = _at(event.phase, event.name, event.category, event.thread, begin)
        if event.phase == "life":
            yield from self._life(event)
            return
        if event.phase == "flow":
            entry["tid"], entry["ph"], entry["id"] = event.args, "s", self._new_id()
            yield entry
            yield {**entry, "tid": event.thread, "ph": "f", "bp": "e", "ts": end}
            return
        if event.phase == "X":
            # Of the rounded ends: slices that end together still do.
            entry["dur"] = round(end - begin, 3)
        elif event.phase == "i":
            entry["s"] = "t"
        if event.args is not None:
            entry["args"] = event.args
        yield entry

    def _life(self, event: _Event) -> Iterator[dict[str, Any]]:
        phases, args = event.args
        identity = self._new_id()

        def entry(phase: str, name: str, time_ns: int) -> dict[str, Any]:
            at = _at(phase, name, event.category, event.thread, self._us(time_ns))
            return {**at, "id": identity}

        yield {**entry("b", event.name, event.begin_ns), "args": args}
        for name, begin, end in phases:
            yield entry("b", name, begin)
            yield entry("e", name, end)
        yield entry("e", event.name, event.end_ns)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


def driver_events(operations: Sequence[str], rows: Iterable[Sequence[int]]) -> Iterator[_Event]:
    """Calls of a driver as slices of their threads.

    Args:
        operations: their names, by number.
        rows: of ``Driver.stop_trace``.
    """
    for op, begin_ns, end_ns, size, pages, calls, thread, failed in rows:
        args: dict[str, Any] = {"calls": calls}
        if size:
            args["bytes"] = size
        if pages:
            args["pages"] = pages
        if failed:
            args["failed"] = True
        yield _Event("X", operations[op], "driver", thread, begin_ns, end_ns, args)


def _open(path: Path) -> IO[str]:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "wt", compresslevel=5, encoding="utf-8")
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the trace cannot be written to {path}: {error.strerror}; give a file in a directory "
            "that exists and can be written to"
        ) from error


def _at(phase: str, name: str, category: str, thread: int, time_us: float) -> dict[str, Any]:
    return {
        "ph": phase,
        "name": name,
        "cat": category,
        "pid": os.getpid(),
        "tid": thread,
        "ts": time_us,
    }


def _metadata(what: str, process: int, thread: int, args: Args) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "ts": 0, "args": args}


def _thread_name(thread: int) -> str:
    """As Python knows a thread, else the operating system; it may have ended."""
    for known in threading.enumerate():
        if known.native_id == thread:
            return known.name
    try:
        return Path(f"/proc/self/task/{thread}/comm").read_text().strip()
    except OSError:
        return f"thread {thread}"
