"""Timing short work on a GPU without timing its launches: captured calls behind a head start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

cuda: Any = torch.cuda  # parts of it are untyped

# The GPU spins for some 0.2 ms before what is timed, so that the launch is queued when it begins.
_HEAD_START_CYCLES = 400_000


def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One CUDA graph of all calls, in order; the function replays it.

    Raises:
        RuntimeError: a call cannot be captured. Nothing is left in capture.
    """
    for call in calls:  # what a first call does besides (loading, choosing) must not be captured
        call()
    torch.cuda.synchronize()
    graph, stream = cuda.CUDAGraph(), cuda.Stream()
    with cuda.stream(stream):  # not `with cuda.graph(...)`: that collects garbage each time
        # The mapper's thread may call the driver meanwhile, which is no part of this capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture is invalid already
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.synchronize()
    return graph.replay  # type: ignore[no-any-return]


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    """The same several times over."""

    def runs() -> None:
        for _ in range(times):
            run()

    return run if times == 1 else runs


def head_start_clock(function: Callable[[], object]) -> float:
    """Seconds that the work takes on the device, without the time to launch its beginning.

    What follows the first launch must be launched faster than it runs: replays of captured graphs.
    """
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
