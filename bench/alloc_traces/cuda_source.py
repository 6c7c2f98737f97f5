"""Traces recorded on a GPU by PyTorch's own history of its caching allocator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.alloc_traces.builder import TraceBuilder
from bench.alloc_traces.program import Program
from bench.alloc_traces.trace_file import AllocTrace

# Entries that are not the program's doing: when a stream was done with a block, what the allocator
# took from the driver and gave back, requests that failed, and notes.
_IGNORED = frozenset(
    {
        "free_completed",
        "segment_alloc",
        "segment_free",
        "segment_map",
        "segment_unmap",
        "snapshot",
        "oom",
        "user_defined",
    }
)


class CudaMarks:
    """Iterations as counts of the requests before them; makes their streams the current ones."""

    def __init__(self, device: torch.device) -> None:
        self.requests_before: list[int] = []
        self._device = device
        self._first = _requests(device)
        self._streams = {0: torch.cuda.current_stream(device)}

    def iteration(self, stream: int = 0) -> None:
        self.requests_before.append(_requests(self._device) - self._first)
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                self._device
            )
        # What one iteration wrote the next one may read, whichever their streams are.
        self._streams[stream].wait_stream(torch.cuda.current_stream(self._device))
        torch.cuda.set_stream(self._streams[stream])

    def close(self) -> None:
        """The stream that the program began on is the current one again."""
        torch.cuda.set_stream(self._streams[0])


def record_cuda(
    name: str, program: Program, meta: Mapping[str, Any], device: torch.device
) -> AllocTrace:
    """Runs a program on a GPU and returns what it asked of PyTorch's caching allocator there.

    Args:
        name: of the trace.
        program: what to run.
        meta: what goes into the trace's own, besides where it was recorded.
        device: a CUDA device.

    Raises:
        ValueError: the device is not a CUDA one, nothing was allocated, or entries that do not fit
            together.
    """
    if device.type != "cuda":
        raise ValueError(f"the history of {device} cannot be recorded; give a CUDA device")
    given: int | None = device.index  # None: the current one, whatever the stub says
    index = torch.cuda.current_device() if given is None else given
    device = torch.device("cuda", index)
    torch.cuda.synchronize(device)
    # Where a history was on before this, its entries would be taken for the program's.
    torch.cuda.memory._record_memory_history("all", context=None, clear_history=True)
    marks = CudaMarks(device)
    try:
        kept = program(device, marks)
        torch.cuda.synchronize(device)
        entries = torch.cuda.memory._snapshot()["device_traces"][index]
    finally:
        torch.cuda.memory._record_memory_history(None)
        marks.close()
    source = {
        "recorded_on": f"{torch.cuda.get_device_name(device)}, torch's memory history",
        "torch": torch.__version__,
    }
    trace = trace_of_entries(name, entries, {**source, **meta}, marks.requests_before)
    del kept
    return trace


def trace_of_entries(
    name: str,
    entries: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    requests_before: Sequence[int] = (),
) -> AllocTrace:
    """The trace in one device's entries of a memory snapshot (``device_traces[device]``).

    A block is released where the program did so (``free_requested``), not where its streams were
    done with it. Streams are numbered in the order of their first request.

    Args:
        name: of the trace.
        entries: with ``action``, ``addr``, ``size`` (bytes) and ``stream``, in order.
        meta: what goes into the trace's own.
        requests_before: for each iteration how many requests came before it, ascending.

    Raises:
        ValueError: an unknown action, entries that do not fit together, or no requests.
    """
    builder = TraceBuilder()
    streams: dict[int, int] = {}
    starts = list(requests_before)[::-1]
    requests = 0
    for number, entry in enumerate(entries):
        action = entry["action"]
        if action == "alloc":
            # An iteration begins with its first request, so that the last one is like the others.
            while starts and starts[-1] <= requests:
                starts.pop()
                builder.start_iteration()
            stream = streams.setdefault(entry["stream"], len(streams))
            builder.request(entry["addr"], entry["size"], stream)
            requests += 1
        elif action == "free_requested":
            builder.release(entry["addr"])
        elif action not in _IGNORED:
            raise ValueError(
                f"entry {number} of the snapshot has action {action!r}, which this code does not "
                "know; say in cuda_source.py whether it moves memory"
            )
    return builder.build(name, meta)


def _requests(device: torch.device) -> int:
    """Requests that the caching allocator has served on a device."""
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])
