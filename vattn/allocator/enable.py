"""One line that makes all of PyTorch's CUDA memory come from vattn."""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vattn import _core
from vattn.config import env_bytes, not_negative_int, parse_bytes, positive_int

if TYPE_CHECKING:
    from vattn.allocator.torch_hooks import Patches

_CONF_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass
class _Enabled:
    """What disable() undoes."""

    patches: Patches
    torch_allocator: object  # PyTorch calls it for ever
    before: int | None  # PyTorch's own, as an address


_enabled: _Enabled | None = None
_kept: list[object] = []  # allocators that PyTorch may still refer to


def is_enabled() -> bool:
    """Whether all of PyTorch's CUDA memory comes from vattn."""
    return _core.torch_allocator_enabled()


def enable(
    *,
    budget_bytes: int | str | None = None,
    page_bytes: int | None = None,
    ahead_bytes: int = 0,
) -> None:
    """Takes all CUDA memory of this process from one pool of pages for each device.

    Call it before the first CUDA tensor; nothing touches a GPU here. Weights, activations and KV
    caches (:class:`vattn.KVCache`, :class:`vattn.VirtualCache`, :class:`vattn.LLM`) that are given
    no pool) then share one, so that no split has to be chosen. ``torch.cuda``'s statistics,
    ``empty_cache``, memory fraction, ``record_stream`` and CUDA graphs work as they do.

    Args:
        budget_bytes: most physical memory of each device, a number or text such as ``"40GiB"``;
            None for ``VATTN_BUDGET`` or else what is free when the device is first used, less 1 GiB
            (or a sixteenth, if that is less) for CUDA itself.
        page_bytes: page size, a multiple of the driver's granularity; None for that. A wrong one
            is an error at the device's first use.
        ahead_bytes: pages created in the background ahead of need, up to this much.

    Raises:
        RuntimeError: CUDA is in use already, vattn is enabled already, torch is built without CUDA,
            or lacks something that this takes, which the message names.
        ValueError: a size that is none.
    """
    global _enabled
    if is_enabled():
        raise RuntimeError(
            "vattn.allocator is enabled already; one enable() at the program's start is enough"
        )
    budget = _budget(budget_bytes)
    page = 0 if page_bytes is None else positive_int(page_bytes, "page_bytes")
    ahead = not_negative_int(ahead_bytes, "ahead_bytes")
    import torch

    from vattn.allocator import torch_hooks

    torch_hooks.require_cuda_build()
    if torch_hooks.cuda_in_use():
        raise RuntimeError(
            "PyTorch uses CUDA already, and its allocator can only be replaced before that; call "
            "vattn.allocator.enable() first, or use `with vattn.allocator.pool():`"
        )
    torch_hooks.require_errors()
    torch_hooks.require_statistics()
    allocator = torch_hooks.pluggable_allocator()
    before = torch_hooks.current_allocator_address()
    _core.configure_torch_allocator(
        enabled=True, budget_bytes=budget, page_bytes=page, ahead_bytes=ahead
    )
    try:
        torch.cuda.memory.change_current_allocator(allocator)
    except BaseException:
        _core.configure_torch_allocator(enabled=False)
        raise
    _enabled = _Enabled(torch_hooks.patch_torch(), allocator, before)
    _kept.append(allocator)
    atexit.register(_settle)
    _warn_of_settings()


def disable() -> None:
    """Undoes :func:`enable`, as long as nothing was allocated.

    Raises:
        RuntimeError: vattn is not enabled by this, CUDA is in use already, or this torch has no way
            back to its own allocator.
    """
    global _enabled
    if _enabled is None:
        raise RuntimeError("vattn.allocator is not enabled, so there is nothing to disable")
    import torch

    from vattn.allocator import torch_hooks

    if torch_hooks.cuda_in_use() or _core.torch_allocator_devices():
        raise RuntimeError(
            "CUDA memory of this process is vattn's by now, and tensors may be using it; "
            "vattn.allocator.disable() works before CUDA is used. Start a new process"
        )
    if _enabled.before is None:
        raise RuntimeError(
            f"this PyTorch ({torch.__version__}) has no way back to its own allocator; start a new "
            "process"
        )
    torch_hooks.put_back(_enabled.before)
    _enabled.patches.undo()
    _core.configure_torch_allocator(enabled=False)
    atexit.unregister(_settle)
    _enabled = None


def _budget(budget_bytes: int | str | None) -> int:
    """Bytes, or 0 for the native module's default."""
    if budget_bytes is None:
        return env_bytes("VATTN_BUDGET") or 0
    return parse_bytes(budget_bytes, "budget_bytes")


def _settle() -> None:
    """Lets background work end before the driver is shut down with the process."""
    for device in _core.torch_allocator_devices():
        # In a forked child, or after a lost context, there is nothing to wait for.
        with contextlib.suppress(_core.DriverError):
            allocator = _core.torch_allocator(device)
            assert allocator is not None
            allocator.settle()


def _warn_of_settings() -> None:
    for name in _CONF_VARIABLES:
        if value := os.environ.get(name):
            warnings.warn(
                f"{name}={value} sets PyTorch's own allocator, which vattn.allocator.enable() has "
                "replaced: it has no effect",
                stacklevel=3,
            )
