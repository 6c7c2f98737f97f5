"""Which device a call is about, and its allocator, made where it is the first."""

from __future__ import annotations

import atexit
import contextlib
import operator
from typing import TYPE_CHECKING

from vattn import _core
from vattn.config import env_bytes

if TYPE_CHECKING:
    import torch


def cuda_index(device: str | torch.device | int | None) -> int | None:
    """A device as its number; None where none is given (None, ``"cuda"``).

    Raises:
        ValueError: not a CUDA device.
    """
    if device is None:
        return None
    if not isinstance(device, bool) and hasattr(device, "__index__"):
        index: int | None = operator.index(device)
    else:
        index = _parsed(device)
    if index is not None and index < 0:
        raise ValueError(f"device={device!s} is not a CUDA device; give cuda, cuda:N or N >= 0")
    return index


def current_index() -> int:
    """PyTorch's current device, without starting CUDA to ask."""
    import torch

    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_device() if started else 0


def configure() -> None:
    """Sizes from the environment for allocators that are made without ``enable()``.

    Raises:
        ValueError: ``VATTN_BUDGET`` is no size.
    """
    if not _core.torch_allocator_enabled() and not _core.torch_allocator_devices():
        _core.configure_torch_allocator(enabled=False, budget_bytes=env_bytes("VATTN_BUDGET") or 0)
    settle_at_exit()


def made(device: str | torch.device | int | None) -> _core.CachingAllocator:
    """The allocator of a device, made if need be; PyTorch's CUDA is not started for it.

    Raises:
        ValueError: not a CUDA device, or ``VATTN_BUDGET`` is no size.
        DriverError: no usable CUDA driver.
    """
    index = cuda_index(device)
    configure()
    return _core.make_torch_allocator(current_index() if index is None else index)


def settle_at_exit() -> None:
    """Lets background work end before the driver is shut down with the process."""
    atexit.unregister(_settle)  # once is enough
    atexit.register(_settle)


def _settle() -> None:
    for device in _core.torch_allocator_devices():
        # In a forked child, or after a lost context, there is nothing to wait for.
        with contextlib.suppress(_core.DriverError):
            allocator = _core.torch_allocator(device)
            assert allocator is not None
            allocator.settle()


def _parsed(device: object) -> int | None:
    import torch

    wrong = f"device={device!s} is not a CUDA device; give cuda or cuda:N"
    if isinstance(device, bool):
        raise ValueError(wrong)
    try:
        parsed = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(wrong) from error
    if parsed.type != "cuda":
        raise ValueError(wrong)
    index: int | None = parsed.index
    return index
