"""Parts of a program's memory by name: where they are allocated, paused, resumed and bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator.enable import is_enabled
from vattn.allocator.which import allocator_of
from vattn.config import not_negative_int, parse_bytes

if TYPE_CHECKING:
    import torch

    from vattn.kv.pool import PagePool

_lock = threading.Lock()
_known: set[str] = set()
# Pinned memory that holds the contents of paused tags, by tag and device.
_backups: dict[tuple[str, int], torch.Tensor] = {}


@contextmanager
def pool(
    tag: str | None = None, *, device: str | torch.device | int | None = None
) -> Iterator[None]:
    """CUDA memory that this thread allocates inside comes from vattn, under a name.

    Under :func:`~vattn.allocator.enable` this only names it. Without, PyTorch's own allocator stays
    in charge of the rest, and of dividing what it gets from vattn in segments of 2 MiB and more
    (``torch.cuda.MemPool``); its statistics go on.

    Pools nest, the innermost counts. Other threads are not affected: what autograd allocates in its
    own threads during ``backward()`` has no tag.

    Args:
        tag: for :func:`pause`, :func:`resume`, :func:`set_budget` and reports; None for none.
        device: whose memory, without ``enable()``; None for the current device. With it all
            devices' is meant, and none may be given.

    Raises:
        ValueError: an empty tag, too many tags, or a device under ``enable()``.
        RuntimeError: torch is built without CUDA, or lacks what this takes.
    """
    number = 0 if tag is None else _number(tag)
    if is_enabled():
        if device is not None:
            raise ValueError(
                f"device={device!s}: under vattn.allocator.enable() a pool names what is allocated "
                "on any device; leave it out"
            )
        with _tagged(number):
            yield
        return
    from vattn.allocator import mem_pools

    with mem_pools.routed(number, _index(device)):
        yield


def pause(
    tag: str,
    *,
    backup: bool = True,
    pinned: bool | None = None,
    device: str | torch.device | int | None = None,
) -> None:
    """Gives the physical memory of a tag's tensors back, while they keep their addresses.

    It waits for the streams that used them. Until :func:`resume` nobody may touch them, and nothing
    can be allocated under the tag.

    Args:
        tag: a name that :func:`pool` was given.
        backup: keep the contents in the host's memory; without, they are lost.
        pinned: keep them in page-locked memory, which is faster and cannot be swapped out; None for
            yes if PyTorch uses CUDA.
        device: None for all devices; if one of them fails, none is paused.

    Raises:
        ValueError: an unknown tag, one that is paused, or ``pinned`` without a backup.
        MemoryError: the host has no room for the backup.
    """
    from vattn.allocator import torch_hooks

    number = _known_number(tag)
    if pinned is not None and not backup:
        raise ValueError(
            f"pinned={pinned} says how a backup is kept, and backup=False asks for none"
        )
    paused = []
    try:
        for index, allocator in _each(device):
            use_pinned = backup and (torch_hooks.cuda_in_use() if pinned is None else pinned)
            room = (
                _pinned_room(tag, index, allocator.tag_live_bytes(number)) if use_pinned else None
            )
            if room is None:
                allocator.pause(number, backup=backup)
            else:
                allocator.pause(number, backup=True, host=room.data_ptr(), host_bytes=room.nbytes)
                _backups[tag, index] = room
            paused.append((index, allocator))
    except BaseException:
        for index, allocator in paused:
            allocator.resume(number)
            _backups.pop((tag, index), None)
        raise


def resume(tag: str, *, device: str | torch.device | int | None = None) -> None:
    """Brings the memory of a paused tag back, with its contents if they were kept.

    Raises:
        ValueError: an unknown tag, or one that is not paused.
        MemoryError: :class:`vattn.OutOfPages`, there is not enough memory; the tag stays paused, on
            this device and those after it.
    """
    number = _known_number(tag)
    each = [(i, a) for i, a in _each(device) if a.is_paused(number)]
    if not each:
        raise ValueError(f"tag={tag!r} is not paused, so there is nothing to resume")
    for index, allocator in each:
        allocator.resume(number)
        _backups.pop((tag, index), None)


def is_paused(tag: str, *, device: str | torch.device | int | None = None) -> bool:
    """Whether a tag is paused on a device; None for any."""
    number = _known_number(tag)
    return any(allocator.is_paused(number) for _, allocator in _each(device))


def set_budget(
    tag: str, budget_bytes: int | str | None, *, device: str | torch.device | int | None = None
) -> None:
    """Bounds the physical memory of a tag on one device, which is opened if it is not in use yet.

    Args:
        tag: need not have been used before.
        budget_bytes: a number or text such as ``"2GiB"``; None for no bound. Beyond it there is
            ``torch.OutOfMemoryError``, whatever the rest has left.
        device: None for the current one.

    Raises:
        ValueError: no size, or less than a page.
        RuntimeError: no allocator is in charge of the device.
    """
    size = 0 if budget_bytes is None else parse_bytes(budget_bytes, "budget_bytes")
    _made(device).set_tag_budget(_number(tag), size)


def trim(keep_bytes: int = 0, *, device: str | torch.device | int | None = None) -> int:
    """Gives idle memory beyond ``keep_bytes`` back to the device; returns the bytes given.

    Waits for the streams that used it, each by an event. ``torch.cuda.empty_cache()`` under
    ``enable()`` is this.

    Args:
        keep_bytes: of each device.
        device: None for all.

    Raises:
        ValueError: a negative number.
    """
    keep = not_negative_int(keep_bytes, "keep_bytes")
    return sum(allocator.trim(keep) for _, allocator in _each(device))


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

    return PagePool.of_allocator(_made(device))


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


def _known_number(tag: str) -> int:
    with _lock:
        if tag not in _known:
            names = ", ".join(sorted(_known)) or "there are none"
            raise ValueError(
                f"tag={tag!r} was never given to vattn.allocator.pool(); those that were: {names}"
            )
    return _core.tag_id(tag)


def _index(device: str | torch.device | int | None) -> int | None:
    if device is None or isinstance(device, int):
        return device
    import torch

    parsed = torch.device(device)
    if parsed.type != "cuda":
        raise ValueError(f"device={device!s} is not a CUDA device; give cuda or cuda:N")
    return parsed.index


def _each(
    device: str | torch.device | int | None,
) -> list[tuple[int, _core.CachingAllocator]]:
    """The allocators that an operation on a device, or on all, is about."""
    if device is not None:
        allocator = allocator_of(device)
        return [each for each in _each(None) if each[1] is allocator]
    out = []
    for index in _core.torch_allocator_devices():
        each = _core.torch_allocator(index)
        assert each is not None
        out.append((index, each))
    return out


def _made(device: str | torch.device | int | None) -> _core.CachingAllocator:
    """The allocator of a device, made if need be."""
    index = _index(device)
    if index is None:
        import torch

        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _core.make_torch_allocator(index)


def _pinned_room(tag: str, index: int, nbytes: int) -> torch.Tensor | None:
    """Page-locked memory for a backup; None if there is nothing to keep."""
    if nbytes == 0:
        return None
    import torch

    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise MemoryError(
            f"no page-locked memory for {nbytes} bytes of tag={tag!r} on cuda:{index}: {error}; "
            "give pinned=False"
        ) from error
