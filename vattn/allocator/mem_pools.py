"""vattn's memory for parts of a program whose allocator is PyTorch's: ``torch.cuda.MemPool``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from vattn import _core
from vattn.allocator import torch_hooks
from vattn.config import env_bytes

# PyTorch frees segments through it until the process ends.
_torch_allocator: list[Any] = []
_lock = threading.Lock()


class _Thread(threading.local):
    """What one thread has: PyTorch lets no two threads allocate to one MemPool at a time."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, int], Any] = {}  # by tag and device
        self.routes: list[_Route] = []


_thread = _Thread()


class _Route:
    """This thread's requests on one device go to a MemPool, while it is open."""

    def __init__(self, mem_pool: Any, device: int) -> None:
        self.device = device
        self._mem_pool = mem_pool
        self._context: AbstractContextManager[None] | None = None

    def open(self) -> None:
        context: AbstractContextManager[None] = torch.cuda.use_mem_pool(
            self._mem_pool, device=self.device
        )
        context.__enter__()
        self._context = context

    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


@contextmanager
def routed(tag: int, device: int | None) -> Iterator[None]:
    """Requests of this thread on a device come from vattn, in whole segments.

    Of pools within pools the innermost has them; PyTorch itself would give them to the outermost.

    Raises:
        RuntimeError: torch is built without CUDA, or lacks what this takes.
    """
    torch_hooks.require_cuda_build()
    index = torch.cuda.current_device() if device is None else device
    route = _Route(_mem_pool(tag, index), index)
    outer = next((r for r in reversed(_thread.routes) if r.device == index), None)
    if outer is not None:
        outer.close()
    before = _core.set_segment_tag(index, tag)
    try:
        route.open()
        _thread.routes.append(route)
        try:
            yield
        finally:
            _thread.routes.remove(route)
            route.close()
    finally:
        _core.set_segment_tag(index, before)
        if outer is not None:
            outer.open()


def _mem_pool(tag: int, device: int) -> Any:
    pools = _thread.pools
    if (tag, device) not in pools:
        with torch.cuda.device(device):
            pools[tag, device] = torch.cuda.MemPool(_allocator())
    return pools[tag, device]


def _allocator() -> Any:
    with _lock:
        if not _torch_allocator:
            torch_hooks.require_errors()
            if not _core.torch_allocator_devices():
                _core.configure_torch_allocator(
                    enabled=False, budget_bytes=env_bytes("VATTN_BUDGET") or 0
                )
            _torch_allocator.append(torch_hooks.pluggable_allocator("vattn_torch_try_alloc"))
        return _torch_allocator[0].allocator()
