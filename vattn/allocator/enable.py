"""One line that makes all of PyTorch's CUDA memory come from vattn."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator import first_use, torch_settings
from vattn.config import env_bytes, not_negative_int, parse_bytes, positive_int

if TYPE_CHECKING:
    from vattn.allocator.torch_hooks import Patches

_FINEST_GRANULARITY = 1 << 16


@dataclass
class _Enabled:
    """What disable() undoes."""

    patches: Patches
    torch_allocator: object  # PyTorch calls it for ever
    before: int | None  # PyTorch's own, as an address


_enabled: _Enabled | None = None
_lock = threading.RLock()  # held while it is turned on or off
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
        page_bytes: page size, a multiple of the driver's granularity; None for that. One that
            is a multiple of 64 KiB and still wrong is an error at the device's first use.
        ahead_bytes: pages created in the background ahead of need, up to this much.

    Raises:
        RuntimeError: CUDA or memory of vattn is in use already, vattn is enabled already, torch is
            built without CUDA, or lacks something that this takes, which the message names.
        ValueError: a size that is none.
    """
    budget = _budget(budget_bytes)
    page = _page(page_bytes)
    ahead = not_negative_int(ahead_bytes, "ahead_bytes")
    with _lock:
        _require_first()
        _turn_on(budget_bytes=budget, page_bytes=page, ahead_bytes=ahead)
    first_use.settle_at_exit()
    torch_settings.warn_of_environment()


def _require_first() -> None:
    """Raises RuntimeError if it is too late, or this torch lacks something."""
    if is_enabled():
        raise RuntimeError(
            "vattn.allocator is enabled already; one enable() at the program's start is enough"
        )
    from vattn.allocator import torch_hooks

    torch_hooks.require_cuda_build()
    if torch_hooks.cuda_in_use():
        raise RuntimeError(
            "PyTorch uses CUDA already, and its allocator can only be replaced before that; call "
            "vattn.allocator.enable() first, or use `with vattn.allocator.pool():`"
        )
    if _core.torch_allocator_devices():
        raise RuntimeError(
            "memory of vattn is in use already: page_pool(), set_budget() or pool() of "
            "vattn.allocator came first; call vattn.allocator.enable() before them"
        )
    torch_hooks.require_errors()
    torch_hooks.require_statistics()
    _require_mem_pools()


def _require_mem_pools() -> None:
    import torch

    names = [
        f"{module.__name__}.{name}"
        for module in (torch.cuda, torch.cuda.memory)
        for name in ("MemPool", "use_mem_pool")
        if not hasattr(module, name)
    ]
    if names:
        raise RuntimeError(
            f"this PyTorch ({torch.__version__}) has no {', '.join(names)}; use one that vattn "
            "supports, 2.11 to 2.13"
        )


def _turn_on(*, budget_bytes: int, page_bytes: int, ahead_bytes: int) -> None:
    """Replaces torch's allocator and what asks it for figures: all of it, or nothing."""
    global _enabled
    import torch

    from vattn.allocator import torch_hooks

    allocator = torch_hooks.pluggable_allocator()
    before = torch_hooks.current_allocator_address()
    _core.configure_torch_allocator(
        enabled=True, budget_bytes=budget_bytes, page_bytes=page_bytes, ahead_bytes=ahead_bytes
    )
    patches: Patches | None = None
    try:
        patches = torch_hooks.patch_torch()
        torch.cuda.memory.change_current_allocator(allocator)
    except BaseException:
        if patches is not None:
            patches.undo()
        _core.configure_torch_allocator(enabled=False)
        raise
    _enabled = _Enabled(patches, allocator, before)
    _kept.append(allocator)


def disable() -> None:
    """Undoes :func:`enable`, as long as nothing was allocated.

    Raises:
        RuntimeError: vattn is not enabled by this, CUDA is in use already, or this torch has no way
            back to its own allocator.
    """
    global _enabled
    with _lock:
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
                f"this PyTorch ({torch.__version__}) has no way back to its own allocator; start a "
                "new process"
            )
        torch_hooks.put_back(_enabled.before)
        _enabled.patches.undo()
        _core.configure_torch_allocator(enabled=False)
        _enabled = None


def _page(page_bytes: int | None) -> int:
    """Bytes, or 0 for the driver's granularity, which is not known before a device is used."""
    if page_bytes is None:
        return 0
    page = positive_int(page_bytes, "page_bytes")
    if page % _FINEST_GRANULARITY:
        raise ValueError(
            f"page_bytes={page} is not a multiple of the driver's granularity, which is 2 MiB on "
            "most devices and at least 64 KiB; give 2097152 or leave it out"
        )
    return page


def _budget(budget_bytes: int | str | None) -> int:
    """Bytes, or 0 for the native module's default."""
    if budget_bytes is None:
        return env_bytes("VATTN_BUDGET") or 0
    return parse_bytes(budget_bytes, "budget_bytes")
