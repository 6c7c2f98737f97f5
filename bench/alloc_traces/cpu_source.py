"""Traces recorded on a CPU by PyTorch's profiler, which sees every request to torch's allocator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.alloc_traces.builder import TraceBuilder
from bench.alloc_traces.program import Program
from bench.alloc_traces.trace_file import AllocTrace

_MARK = "vattn.alloc_traces.iteration:"
_MARKED = re.compile(re.escape(_MARK) + r"(\d+)")


class ProfilerMarks:
    """Iterations as annotations among the profiler's events."""

    def iteration(self, stream: int = 0) -> None:
        with record_function(f"{_MARK}{stream}"):
            pass


def record_cpu(name: str, program: Program, meta: Mapping[str, Any]) -> AllocTrace:
    """Runs a program on the CPU and returns its allocations on the CPU.

    All of torch's threads that the profiler follows are in it: the caller's and those of autograd.
    Where a program computes with Python's numbers, the 8 bytes of each are in it, too.

    Args:
        name: of the trace.
        program: what to run.
        meta: what goes into the trace's own, besides where it was recorded.

    Raises:
        RuntimeError: a profiler is running already.
        ValueError: nothing was allocated, or the events do not fit together.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = program(torch.device("cpu"), ProfilerMarks())
    results = recorded.profiler.kineto_results if recorded.profiler else None
    assert results is not None, "the profiler has run"
    source = {"recorded_on": "cpu, torch.profiler", "torch": torch.__version__}
    trace = trace_of_events(name, results.experimental_event_tree(), {**source, **meta})
    del kept
    return trace


def trace_of_events(
    name: str, roots: Iterable[_ProfilerEvent], meta: Mapping[str, Any]
) -> AllocTrace:
    """The trace in a profiler's event tree.

    Args:
        name: of the trace.
        roots: of the tree; CPU allocations are used, all other events are not.
        meta: what goes into the trace's own.

    Raises:
        ValueError: no allocations, or events that do not fit together.
    """
    builder = TraceBuilder()
    stream = 0
    # Stable: events of one thread are in order in the tree, also where their times are equal.
    for event in sorted(_used(roots), key=lambda event: event.start_time_ns):
        if event.tag != _EventType.Allocation:
            stream = int(event.name.removeprefix(_MARK))
            builder.start_iteration()
            continue
        block: Any = event.extra_fields
        if block.alloc_size > 0:
            builder.request(block.ptr, block.alloc_size, stream)
        else:
            builder.release(block.ptr)
    return builder.build(name, meta)


def _used(roots: Iterable[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    """Allocations on the CPU and marks, each thread's in the order of time."""
    waiting = list(roots)[::-1]
    while waiting:
        event = waiting.pop()
        waiting.extend(reversed(event.children))
        if event.tag == _EventType.Allocation:
            block: Any = event.extra_fields
            if block.device.type == "cpu":
                yield event
        elif event.tag == _EventType.TorchOp and _MARKED.fullmatch(event.name):
            yield event
