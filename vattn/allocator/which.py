"""Which allocator a call is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattn import _core

if TYPE_CHECKING:
    import torch


def allocator_of(
    device: str | torch.device | int | None, allocator: _core.CachingAllocator | None = None
) -> _core.CachingAllocator:
    """The allocator that a function with these two arguments is about.

    Args:
        device: whose allocator; None for the current device.
        allocator: if given, it is the one.

    Raises:
        ValueError: both are given, or ``device`` is not a CUDA device.
        RuntimeError: no allocator is in charge of the device.
    """
    if allocator is not None:
        if device is not None:
            raise ValueError(f"device={device!s} and an allocator are given; leave one of them out")
        return allocator
    index = _index(device)
    found = _core.torch_allocator(index)
    if found is None:
        raise RuntimeError(
            f"no allocator of vattn is in charge of cuda:{index}; call vattn.allocator.enable() "
            "before the first CUDA tensor"
        )
    return found


def _index(device: str | torch.device | int | None) -> int:
    if isinstance(device, int):
        return device
    import torch

    parsed = torch.device("cuda" if device is None else device)
    if parsed.type != "cuda":
        raise ValueError(f"device={device!s} is not a CUDA device; give cuda or cuda:N")
    if parsed.index is not None:
        return parsed.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0
