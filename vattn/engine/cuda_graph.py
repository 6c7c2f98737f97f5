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
                with contextlib.suppress(RuntimeError):  # why it failed is known already
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        current.wait_stream(self._stream)

    def replay(self) -> None:
        """See :meth:`Graph.replay`."""
        self._graph.replay()


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
