"""Which allocator a call is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator.first_use import cuda_index, current_index

if TYPE_CHECKING:
    import torch


def allocator_of(
    device: str | torch.device | int | None,
    allocator: _core.CachingAllocator | None = None,
    *,
    make: bool = False,
) -> _core.CachingAllocator:
    """The allocator that a function with these two arguments is about.

    Args:
        device: whose allocator; None for the current device.
        allocator: if given, it is the one.
        make: under ``enable()``, make that of a device where nothing was allocated so far.

    Raises:
        ValueError: both are given, or ``device`` is not a CUDA device.
        RuntimeError: no allocator is in charge of the device, or there is no such device.
    """
    if allocator is not None:
        if device is not None:
            raise ValueError(f"device={device!s} and an allocator are given; leave one of them out")
        return allocator
    index = cuda_index(device)
    if index is None:
        index = current_index()
    found = _core.torch_allocator(index)
    if found is not None:
        return found
    if not _core.torch_allocator_enabled():
        raise RuntimeError(
            f"no allocator of vattn is in charge of cuda:{index}; call vattn.allocator.enable() "
            "before the first CUDA tensor, or allocate inside `with vattn.allocator.pool():` first"
        )
    _require_device(index)
    if not make:
        raise RuntimeError(
            f"there is no allocator on cuda:{index} yet, since nothing was allocated there; "
            "allocate a tensor on it first"
        )
    return _core.make_torch_allocator(index)


def _require_device(index: int) -> None:
    import torch

    count = torch.cuda.device_count()
    if index >= count:
        raise RuntimeError(f"there is no cuda:{index}: PyTorch sees {count} CUDA devices")
