"""Pausing a tag: its physical memory goes, its addresses stay, its contents wait in the host's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator.tags import allocators_of, known_number

if TYPE_CHECKING:
    import torch

    from vattn.allocator.host_room import PinnedRoom

# Page-locked memory with the contents of paused tags, by tag and device; mem_pools.state_lock is
# held where it is used.
_backups: dict[tuple[str, int], PinnedRoom] = {}


def pause(
    tag: str,
    *,
    backup: bool = True,
    pinned: bool | None = None,
    device: str | torch.device | int | None = None,
) -> None:
    """Gives the physical memory of a tag's tensors back, while they keep their addresses.

    It waits for the device first. Until :func:`resume` nobody may touch them, and nothing can be
    allocated under the tag on these devices.

    Args:
        tag: a name that :func:`pool` was given.
        backup: keep the contents in the host's memory; without, they are lost.
        pinned: keep them in page-locked memory, which is faster and cannot be swapped out, and
            which the host has back after :func:`resume`; None for yes if PyTorch uses CUDA and as
            much can be locked.
        device: None for all that are in use by now; if one of them fails, those before are resumed
            (without a backup their contents are lost).

    Raises:
        ValueError: an unknown tag, one that is paused, ``pinned`` without a backup, or not a CUDA
            device.
        RuntimeError: nothing was allocated on the device yet, or without ``enable()`` a
            :func:`pool` of the tag is open.
        MemoryError: the host has no room for the backup.
    """
    number = known_number(tag)
    if pinned is not None and not backup:
        raise ValueError(
            f"pinned={pinned} says how a backup is kept, and backup=False asks for none"
        )
    from vattn.allocator import mem_pools

    with mem_pools.state_lock:
        each = allocators_of(device)
        _check_pausable(tag, number, each)
        try:
            for index, allocator in each:
                _pause_one(tag, index, allocator, backup, pinned)
        except BaseException as error:
            _undo_pause(tag, number, each, error)
            raise


def resume(tag: str, *, device: str | torch.device | int | None = None) -> None:
    """Brings the memory of a paused tag back, with its contents if they were kept.

    Raises:
        ValueError: an unknown tag, one that is not paused, or not a CUDA device.
        RuntimeError: nothing was allocated on the device yet.
        MemoryError: :class:`vattn.OutOfPages`, there is not enough memory; the tag stays paused, on
            this device and those after it.
    """
    number = known_number(tag)
    from vattn.allocator import mem_pools

    with mem_pools.state_lock:
        each = [(i, a) for i, a in allocators_of(device) if a.is_paused(number)]
        if not each:
            raise ValueError(f"tag={tag!r} is not paused, so there is nothing to resume")
        for index, allocator in each:
            allocator.resume(number)
            _drop_backup(tag, index)


def is_paused(tag: str, *, device: str | torch.device | int | None = None) -> bool:
    """Whether a tag is paused on a device; None for any.

    Raises:
        ValueError: an unknown tag, or not a CUDA device.
        RuntimeError: nothing was allocated on the device yet.
    """
    number = known_number(tag)
    return any(allocator.is_paused(number) for _, allocator in allocators_of(device))


def _check_pausable(tag: str, number: int, each: list[tuple[int, _core.CachingAllocator]]) -> None:
    from vattn.allocator import mem_pools

    if not each:
        raise RuntimeError(
            f"tag={tag!r} has no memory: nothing was allocated from vattn yet, so there is nothing "
            "to pause"
        )
    for index, allocator in each:
        if allocator.is_paused(number):
            raise ValueError(f"tag={tag!r} is paused already on cuda:{index}; resume it before")
        if mem_pools.is_open(number, index):
            raise RuntimeError(
                f"a pool of tag={tag!r} is open on cuda:{index}, and PyTorch would go on to serve "
                "tensors from it; pause it after the end of `with vattn.allocator.pool(...):` in "
                "all threads"
            )


def _pause_one(
    tag: str, index: int, allocator: _core.CachingAllocator, backup: bool, pinned: bool | None
) -> None:
    """Pauses a tag on one device; the room of its backup is in _backups before and after."""
    from vattn.allocator import torch_hooks

    number = _core.tag_id(tag)
    locked = backup and (torch_hooks.cuda_in_use() if pinned is None else pinned)
    while True:
        room = _room(tag, index, allocator.tag_live_bytes(number), pinned) if locked else None
        if room is None:
            return allocator.pause(number, backup=backup)
        _backups[tag, index] = room
        try:
            return allocator.pause(number, backup=True, host=room.address, host_bytes=room.nbytes)
        except ValueError:
            # Another thread may have allocated under the tag since it was measured.
            if allocator.tag_live_bytes(number) <= room.nbytes:
                raise
            _drop_backup(tag, index)


def _undo_pause(
    tag: str,
    number: int,
    each: list[tuple[int, _core.CachingAllocator]],
    error: BaseException,
) -> None:
    """Resumes what was paused before ``error``, all that can be; the rest is told in its notes."""
    for index, allocator in each:
        try:
            if allocator.is_paused(number):
                allocator.resume(number)
            _drop_backup(tag, index)
        except Exception as second:
            error.add_note(f"tag={tag!r} stays paused on cuda:{index}: {second}")


def _drop_backup(tag: str, index: int) -> None:
    room = _backups.pop((tag, index), None)
    if room is not None:
        room.drop()


def _room(tag: str, index: int, nbytes: int, pinned: bool | None) -> PinnedRoom | None:
    """Page-locked memory for a backup; None if there is nothing to keep, or no need to lock it."""
    if nbytes == 0:
        return None
    from vattn.allocator.host_room import PinnedRoom

    try:
        return PinnedRoom(nbytes, index)
    except MemoryError as error:
        if pinned is None:
            return None
        raise MemoryError(
            f"no page-locked memory for {nbytes} bytes of tag={tag!r} on cuda:{index}: {error}; "
            "give pinned=False"
        ) from error
