"""Recording what a device is given to do, and doing it again by one launch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Work of a device that is recorded once and run many times."""

    def capture(self, work: Callable[[], object]) -> None:
        """Records what ``work`` launches, without running it.

        Raises:
            RuntimeError: it does something that cannot be recorded, such as waiting for a result.
        """
        ...

    def replay(self) -> None:
        """Launches it all, on torch's current stream."""
        ...


class CudaGraph:
    """A graph of CUDA's.

    Args:
        pool: of memory, shared by graphs that are not replayed side by side.
        stream: to capture on; not the default one.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool
        self._stream = stream

    def capture(self, work: Callable[[], object]) -> None:
        """See :meth:`Graph.capture`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Of this thread only: the thread that maps pages calls the driver whenever it likes.
            self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                try:
                    self._graph.capture_end()
                except RuntimeError:  # why it failed is known already
                    self._clean_up()
                raise
            self._graph.capture_end()
        current.wait_stream(self._stream)

    def _clean_up(self) -> None:
        """Ends what a capture that CUDA has given up leaves begun in torch.

        Its end raises before torch's allocator and random numbers have left the capture: the former
        is told, and the latter leave with the next capture that works, which is of nothing.
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        with contextlib.suppress(RuntimeError):
            empty = torch.cuda.CUDAGraph()
            empty.capture_begin(capture_error_mode="thread_local")
            empty.capture_end()

    def replay(self) -> None:
        """See :meth:`Graph.replay`."""
        self._graph.replay()


def run_without_waiting(work: Callable[[], object], device: torch.device) -> None:
    """On a GPU, runs work that must not ask the device for a result, so that it can be captured.

    Torch tells beforehand, when nothing is lost yet; what CUDA has given up leaves traces.

    Raises:
        RuntimeError: it does ask.
    """
    if device.type != "cuda":
        return  # nobody waits for a CPU
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graph_maker(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs on a device that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda: CudaGraph(pool, stream)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is collected during a capture may free device memory, which ends the capture."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
