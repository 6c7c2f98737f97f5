"""Operators and kernels as torch's profiler sees them, on the time axis of an engine's trace."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

ATTENTION = "vattn::attention"
_MARKER = "vattn::clock"
_MARKERS = 16  # before, and as many after; those that nobody interrupts are a few microseconds long


class _Mark(NamedTuple):
    """Moments before, in and after a range of the profiler's, in nanoseconds."""

    before: int
    within: int
    after: int


class KernelTrace:
    """torch's profiler, running from now on until :meth:`stop` or :meth:`close`.

    It sees the operators of the thread that makes this object, and all kernels of the device.

    Args:
        device: of the model.

    Raises:
        ValueError: a profiler of torch's runs already.
    """

    def __init__(self, device: torch.device) -> None:
        if torch._C._autograd._profiler_enabled():
            raise ValueError(
                "torch's profiler is running already, and there is only one: end it, or trace "
                "without kernels=True"
            )
        self._device = device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._marks = _mark()

    def attention(self, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Calls an attention backend as a range of the profiler's."""
        with record_function(ATTENTION):
            return forward(*args, **named)

    def close(self) -> None:
        """Ends the profiler; what it has seen is lost."""
        self._profile.stop()

    def stop(self, start_ns: int) -> list[dict[str, Any]]:
        """Ends the profiler.

        Args:
            start_ns: the moment that is 0 on the time axis, of ``time.perf_counter_ns``.

        Returns:
            Entries of ``traceEvents``, as processes of their own: one for operators, one for each
            GPU.

        Raises:
            RuntimeError: the profiler has lost what tells its clock.
        """
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._marks += _mark()
        finally:  # there is only one: nobody else could begin
            self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "torch.json")
            self._profile.export_chrome_trace(str(path))
            exported = json.loads(path.read_text())
        events = [event for event in exported["traceEvents"] if _is_wanted(event)]
        marks = [event for event in events if event["name"] == _MARKER]
        offset_us = (self._offset_ns(marks) - start_ns) / 1000
        return _Processes(os.getpid()).moved(
            [event for event in events if event["name"] != _MARKER], offset_us
        )

    def _offset_ns(self, ranges: list[dict[str, Any]]) -> int:
        """From the profiler's clock to ours: each end of a range lies between two known moments."""
        ranges = [event for event in ranges if event["cat"] == "user_annotation"]
        ranges.sort(key=lambda event: event["ts"])
        if len(ranges) != len(self._marks):
            raise RuntimeError(
                f"torch's profiler has {len(ranges)} of {len(self._marks)} ranges that tell its "
                "clock; trace without kernels=True"
            )
        least: list[int] = []
        most: list[int] = []
        for event, mark in zip(ranges, self._marks, strict=True):
            begin_ns, end_ns = (
                round(us * 1000) for us in (event["ts"], event["ts"] + event["dur"])
            )
            least += [mark.before - begin_ns, mark.within - end_ns]
            most += [mark.within - begin_ns, mark.after - end_ns]
        return (max(least) + min(most)) // 2


class _Processes:
    """Numbers of processes that are nobody else's in the file; GPUs count from 0, too."""

    def __init__(self, own: int) -> None:
        self._own = own
        self._numbers: dict[int, int] = {}

    def moved(self, events: list[dict[str, Any]], offset_us: float) -> list[dict[str, Any]]:
        """The events with their processes and times in the file, and what these are called."""
        found = []
        names: dict[tuple[str, int, int], dict[str, Any]] = {}  # the profiler repeats them
        for event in events:
            event["pid"] = self._number(event["pid"])
            if event["ph"] == "M":
                names[event["name"], event["pid"], event["tid"]] = {**event, "ts": 0}
            else:
                event["ts"] = round(max(0.0, event["ts"] + offset_us), 3)
                found.append(event)
        return [*self._named(), *names.values(), *found]

    def _number(self, process: int) -> int:
        return self._numbers.setdefault(process, self._own + 1 + len(self._numbers))

    def _named(self) -> list[dict[str, Any]]:
        entries = []
        for process, number in self._numbers.items():
            name = "torch operators" if process == self._own else f"GPU {process}"
            if process < 0:
                name = "torch profiler"
            for what, args in (
                ("process_name", {"name": name}),
                ("process_sort_index", {"sort_index": number}),
            ):
                entries.append(
                    {"ph": "M", "name": what, "pid": number, "tid": 0, "ts": 0, "args": args}
                )
        return entries


def _is_wanted(event: Mapping[str, Any]) -> bool:
    """Whether an entry is of a thread or a stream, and not of the profiler's bookkeeping."""
    if not isinstance(event.get("pid"), int) or not isinstance(event.get("tid"), int):
        return False
    return event.get("name") not in ("process_name", "process_labels", "process_sort_index")


def _mark() -> list[_Mark]:
    marks = []
    for _ in range(_MARKERS):
        before = perf_counter_ns()
        with record_function(_MARKER):
            within = perf_counter_ns()
        marks.append(_Mark(before, within, perf_counter_ns()))
    return marks
