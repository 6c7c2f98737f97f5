"""vattn's memory for parts of a program whose allocator is PyTorch's: ``torch.cuda.MemPool``."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from vattn import _core
from vattn.allocator import first_use, torch_hooks

# PyTorch frees segments through it until the process ends.
_torch_allocator: list[Any] = []
_lock = threading.Lock()
_EXPANDABLE = re.compile(r"expandable_segments[\s'\"]*:\s*'?\"?true", re.IGNORECASE)

# Held where a route opens and while a tag is paused or resumed: PyTorch serves requests from what
# it has cached, so a route into memory that is away has to be refused before the first of them.
state_lock = threading.RLock()
_open_routes: Counter[tuple[int, int]] = Counter()  # in all threads, by tag and device


class _Thread(threading.local):
    """What one thread has: PyTorch lets no two threads allocate to one MemPool at a time."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, int], Any] = {}  # by tag and device
        self.routes: list[_Route] = []


_thread = _Thread()


class _Route:
    """This thread's requests on one device go to a MemPool, while it is open."""

    def __init__(self, key: tuple[int, int], mem_pool: Any) -> None:
        self.key = key
        self.device = key[1]
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
        RuntimeError: the tag is paused, a CUDA graph is being captured, or torch is built without
            CUDA, lacks what this takes, or is set to do without it.
    """
    torch_hooks.require_cuda_build()
    _require_settings()
    _require_no_capture()
    index = torch.cuda.current_device() if device is None else device
    with _entered(tag, index):
        route = _Route((tag, index), _mem_pool(tag, index))
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


def is_open(tag: int, device: int) -> bool:
    """Whether any thread has a route of the tag; ask with ``state_lock`` held."""
    return _open_routes[tag, device] > 0


def refuse_paused(tag: int, device: int) -> None:
    """Raises RuntimeError if the tag is paused on the device."""
    allocator = _core.torch_allocator(device)
    if tag != 0 and allocator is not None and allocator.is_paused(tag):
        name = _core.tag_name(tag)
        raise RuntimeError(
            f"tag={name!r} is paused on cuda:{device}, so nothing can be allocated under it; call "
            f"vattn.allocator.resume({name!r}) before"
        )


def drop_closed() -> None:
    """This thread's MemPools that are not open give what they have cached back to vattn."""
    if not _thread.pools or _capturing():  # PyTorch frees nothing during a capture
        return
    used = {route.key for route in _thread.routes}
    for key in [k for k in _thread.pools if k not in used]:
        del _thread.pools[key]


@contextmanager
def _entered(tag: int, device: int) -> Iterator[None]:
    with state_lock:
        refuse_paused(tag, device)
        _open_routes[tag, device] += 1
    try:
        yield
    finally:
        with state_lock:
            _open_routes[tag, device] -= 1


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
            first_use.configure()
            _torch_allocator.append(torch_hooks.pluggable_allocator("vattn_torch_try_alloc"))
        return _torch_allocator[0].allocator()


def _require_settings() -> None:
    """MemPools only work in PyTorch's own allocator as it is set by default."""
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        raise RuntimeError(
            f"PyTorch's CUDA allocator is {backend!r}, and vattn.allocator.pool() needs 'native'; "
            "leave that setting out, or call vattn.allocator.enable()"
        )
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        raise RuntimeError(
            "PYTORCH_NO_CUDA_MEMORY_CACHING is set, with which PyTorch ignores "
            "vattn.allocator.pool(); unset it, or call vattn.allocator.enable()"
        )
    for name, text in _settings():
        if _EXPANDABLE.search(text):
            raise RuntimeError(
                f"{name}={text} has expandable segments, with which PyTorch cannot take memory "
                "from vattn.allocator.pool(); leave them out (vattn needs none), or call "
                "vattn.allocator.enable()"
            )


def _settings() -> Iterator[tuple[str, str]]:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        yield name, os.environ.get(name, "")
    # Set by a call; not every PyTorch can tell.
    tell = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if tell is not None:
        try:
            yield "the allocator's settings", str(tell())
        except RuntimeError:
            return


def _require_no_capture() -> None:
    if _capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, whose memory PyTorch takes from a pool of the graph's "
            "own; open vattn.allocator.pool() before or after, or call vattn.allocator.enable()"
        )


def _capturing() -> bool:
    return torch_hooks.cuda_in_use() and bool(torch.cuda.is_current_stream_capturing())
