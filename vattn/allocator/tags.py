"""Parts of a program's memory by name: where they are allocated, paused, resumed and bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator.enable import is_enabled
from vattn.allocator.first_use import cuda_index, current_index, made
from vattn.allocator.which import allocator_of
from vattn.config import not_negative_int, parse_bytes

if TYPE_CHECKING:
    import torch

    from vattn.kv.pool import PagePool

_lock = threading.Lock()
_known: set[str] = set()


@contextmanager
def pool(
    tag: str | None = None, *, device: str | torch.device | int | None = None
) -> Iterator[None]:
    """CUDA memory that this thread allocates inside comes from vattn, under a name.

    Under :func:`~vattn.allocator.enable` this only names it. Without, PyTorch's own allocator stays
    in charge of the rest, and of dividing what it gets from vattn in segments of 2 MiB and more
    (``torch.cuda.MemPool``); its statistics go on.

    Pools nest, the innermost counts. Other threads are not affected: what autograd allocates in its
    own threads during ``backward()`` has no tag. A coroutine or generator must not be suspended
    inside: the tag is the thread's, whatever runs in it meanwhile. Without ``enable()``, capture
    CUDA graphs outside: PyTorch would take their memory from the tag's, not from the graph's.

    Args:
        tag: for :func:`pause`, :func:`resume`, :func:`set_budget` and reports; None for none.
        device: whose memory, without ``enable()``; None for the current device. With it all
            devices' is meant, and none may be given.

    Raises:
        ValueError: an empty tag, too many tags, or a device under ``enable()``.
        RuntimeError: the tag is paused; or, without ``enable()``, a CUDA graph is being captured,
            or torch is built without CUDA, lacks what this takes, or is set to do without it
            (expandable segments, no caching, another allocator).
    """
    number = 0 if tag is None else _number(tag)
    if is_enabled():
        if device is not None:
            raise ValueError(
                f"device={device!s}: under vattn.allocator.enable() a pool names what is allocated "
                "on any device; leave it out"
            )
        from vattn.allocator import mem_pools

        mem_pools.refuse_paused(number, current_index())
        with _tagged(number):
            yield
        return
    index = cuda_index(device)
    from vattn.allocator import mem_pools

    with mem_pools.routed(number, index):
        yield


def set_budget(
    tag: str, budget_bytes: int | str | None, *, device: str | torch.device | int | None = None
) -> None:
    """Bounds the physical memory of a tag on one device, which is opened if it is not in use yet.

    Args:
        tag: need not have been used before.
        budget_bytes: a number or text such as ``"2GiB"``; None for no bound. Beyond it there is
            ``torch.OutOfMemoryError``, whatever the rest has left. Nothing is taken from a tag that
            holds more already; only its further requests fail.
        device: None for the current one.

    Raises:
        ValueError: no size, less than a page, or not a CUDA device.
        DriverError: no usable CUDA driver.
    """
    size = 0
    if budget_bytes is not None:
        size = parse_bytes(budget_bytes, "budget_bytes", ", or None for no bound")
    number = _number(tag)
    allocator = made(device)
    page = allocator.pool.page_bytes
    if 0 < size < page:
        raise ValueError(
            f"budget_bytes={budget_bytes!r} is less than one page of {page} bytes; give at least "
            "that, or None for no bound"
        )
    allocator.set_tag_budget(number, size)


def trim(keep_bytes: int = 0, *, device: str | torch.device | int | None = None) -> int:
    """Gives idle memory beyond ``keep_bytes`` back to the device; returns the bytes given.

    Waits for the streams that used it, each by an event. ``torch.cuda.empty_cache()`` under
    ``enable()`` is this. Without, PyTorch caches what is freed under a :func:`pool`, for that pool
    only; for the pools that this thread opened and closed, this makes it idle first.

    Args:
        keep_bytes: of each device.
        device: None for all.

    Raises:
        ValueError: a negative number, or not a CUDA device.
        RuntimeError: nothing was allocated on the device yet.
    """
    keep = not_negative_int(keep_bytes, "keep_bytes")
    allocators = allocators_of(device)
    if allocators and not is_enabled():
        from vattn.allocator import mem_pools

        mem_pools.drop_closed()
    return sum(allocator.trim(keep) for _, allocator in allocators)


def page_pool(device: str | torch.device | int | None = None) -> PagePool:
    """The physical pages of a device, for caches to share with PyTorch.

    Caches without a pool of their own take it anyway under ``enable()``; without, this is how they
    share what :func:`pool` uses: ``vattn.KVCache(..., pool=vattn.allocator.page_pool("cuda:0"))``.

    Args:
        device: opened if it is not in use yet; None for the current one.

    Raises:
        ValueError: not a CUDA device.
        DriverError: no usable CUDA driver.
    """
    from vattn.kv.pool import PagePool

    return PagePool.of_allocator(made(device))


@contextmanager
def _tagged(number: int) -> Iterator[None]:
    before = _core.set_current_tag(number)
    try:
        yield
    finally:
        _core.set_current_tag(before)


def _number(tag: str) -> int:
    if not isinstance(tag, str):
        raise TypeError(f"tag={tag!r} is not a string")
    number = _core.tag_id(tag)
    with _lock:
        _known.add(tag)
    return number


def known_number(tag: str) -> int:
    """The number of a tag that was used before; ValueError for others."""
    with _lock:
        if tag not in _known:
            names = ", ".join(sorted(_known)) or "there are none"
            raise ValueError(
                f"tag={tag!r} was never given to vattn.allocator.pool(); those that were: {names}"
            )
    return _core.tag_id(tag)


def allocators_of(
    device: str | torch.device | int | None,
) -> list[tuple[int, _core.CachingAllocator]]:
    """The allocators that an operation on a device, or on all, is about."""
    if device is not None:
        index = cuda_index(device)
        allocator = allocator_of(current_index() if index is None else index)
        return [each for each in allocators_of(None) if each[1] is allocator]
    out = []
    for number in _core.torch_allocator_devices():
        each = _core.torch_allocator(number)
        assert each is not None
        out.append((number, each))
    return out
