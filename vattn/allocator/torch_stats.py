"""torch's statistics of CUDA memory, answered by our allocator.

``torch.accelerator`` has functions of its own for the same dictionaries.

Keys are those of ``torch.cuda.memory_stats``, where it says what they mean. Where we differ:

* ``segment``: stretches of mapped addresses, counted when asked: ``peak`` and ``allocated`` are the
  present number, ``freed`` is 0.
* ``inactive_split_bytes.all``: mapped memory that is neither in use nor, in whole pages, free for
  others. It is not counted for small and large requests apart, nor in blocks.
* ``num_device_alloc`` and ``num_device_free``: mappings made and undone by the driver.
* ``num_sync_all_streams``, ``oversize_*``: always 0, since there is no such thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vattn import _core
from vattn.allocator.memory_snapshot import snapshot

_KINDS = ("all", "small_pool", "large_pool")
_COUNTED = (
    "allocation",
    "active",
    "allocated_bytes",
    "active_bytes",
    "requested_bytes",
    "reserved_bytes",
)


def memory_stats(device: int) -> dict[str, Any]:
    """``torch._C._cuda_memoryStats``: nested, for ``memory_stats_as_nested_dict``."""
    allocator = _allocator(device)
    figures = _NOTHING if allocator is None else allocator.figures()
    out: dict[str, Any] = {
        name: {kind: dict(figures[kind][name]) for kind in _KINDS} for name in _COUNTED
    }
    out["segment"] = {kind: _constant(figures[kind]["segments"]) for kind in _KINDS}
    out["inactive_split"] = {kind: _constant(0) for kind in _KINDS}
    out["inactive_split_bytes"] = {kind: _constant(0) for kind in _KINDS}
    everything = figures["all"]
    scattered = everything["reserved_bytes"]["current"] - everything["active_bytes"]["current"]
    scattered = max(0, scattered - figures["idle_bytes"])
    out["inactive_split_bytes"]["all"] = _constant(scattered)
    calls = {} if allocator is None else allocator.pool.driver.counters()
    out["num_alloc_retries"] = figures["num_alloc_retries"]
    out["num_ooms"] = figures["num_ooms"]
    out["max_split_size"] = -1
    out["num_sync_all_streams"] = 0
    out["num_device_alloc"] = calls.get("map", (0, 0))[0]
    out["num_device_free"] = calls.get("unmap", (0, 0))[0]
    out["oversize_allocations"] = _constant(0)
    out["oversize_segments"] = _constant(0)
    return out


def reset_peaks(device: int) -> None:
    """``torch._C._cuda_resetPeakMemoryStats``."""
    allocator = _allocator(device)
    if allocator is not None:
        allocator.reset_peaks()


def reset_accumulated(device: int) -> None:
    """``torch._C._cuda_resetAccumulatedMemoryStats``."""
    allocator = _allocator(device)
    if allocator is not None:
        allocator.reset_accumulated()


def memory_snapshot(
    what: tuple[int, int] | tuple[int, int, bool] | None = None,
) -> dict[str, Any]:
    """``torch._C._cuda_memorySnapshot``: of all devices, or of one pool of CUDA graphs.

    Args:
        what: the pool's id, (0, 0) for all memory, and whether to include traces, which PyTorch
            leaves out before it has ``include_traces``; None for all.
    """
    first, second, *rest = (0, 0) if what is None else what
    traces = all(rest)
    out: dict[str, Any] = {"segments": [], "device_traces": []}
    for device in _core.torch_allocator_devices():
        one = snapshot(allocator=_core.torch_allocator(device))
        out = {
            **one,
            "segments": out["segments"] + one["segments"],
            "device_traces": out["device_traces"],
        }
        missing = device + 1 - len(out["device_traces"])
        out["device_traces"] += [[] for _ in range(missing)]
        if traces:
            out["device_traces"][device] = one["device_traces"][-1]
    if (first, second) != (0, 0):
        wanted = (first, second)
        out["segments"] = [s for s in out["segments"] if s.get("segment_pool_id") == wanted]
    return out


def memory_fraction(device: int) -> float:
    """``torch._C._cuda_getMemoryFraction``."""
    allocator = _allocator(device)
    limit = 0 if allocator is None else allocator.figures()["limit_bytes"]
    if allocator is None or limit == 0:
        return 1.0
    fraction, its_limit = _fractions.get(device, (0.0, 0))
    if its_limit == limit:
        return fraction
    return float(limit / allocator.pool.driver.memory_info()[1])


def set_memory_fraction(original: Callable[[float, int], None]) -> Callable[[float, int], None]:
    """``torch._C._cuda_setMemoryFraction`` that keeps the number as it was given.

    The limit is whole pages, from which the number cannot be told.
    """

    def set_fraction(fraction: float, device: int) -> None:
        original(fraction, device)
        allocator = _allocator(device)
        if allocator is not None:
            _fractions[device] = fraction, allocator.figures()["limit_bytes"]

    return set_fraction


# What was set, and the limit in bytes that it became, by device.
_fractions: dict[int, tuple[float, int]] = {}

# What each function of torch._C becomes.
ANSWERS = {
    "_cuda_memoryStats": memory_stats,
    "_cuda_resetPeakMemoryStats": reset_peaks,
    "_cuda_resetAccumulatedMemoryStats": reset_accumulated,
    "_cuda_memorySnapshot": memory_snapshot,
    "_cuda_getMemoryFraction": memory_fraction,
}
# The same for torch.accelerator, as far as this torch has it.
ACCELERATOR_ANSWERS: dict[str, Callable[..., Any]] = {
    "_accelerator_getDeviceStats": memory_stats,
    "_accelerator_resetPeakStats": reset_peaks,
    "_accelerator_resetAccumulatedStats": reset_accumulated,
    # These ask PyTorch's own allocator, which stays registered for the device and unused.
    "_accelerator_isAllocatorInitialized": lambda: torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
    "_accelerator_emptyCache": lambda: torch.cuda.empty_cache(),
}


def _constant(value: int) -> dict[str, int]:
    return {"current": value, "peak": value, "allocated": value, "freed": 0}


_NOTHING: dict[str, Any] = {
    "num_alloc_retries": 0,
    "num_ooms": 0,
    "idle_bytes": 0,
} | {kind: {name: _constant(0) for name in _COUNTED} | {"segments": 0} for kind in _KINDS}


def _allocator(device: int) -> _core.CachingAllocator | None:
    """The device's allocator; None before its first use.

    Raises:
        RuntimeError: PyTorch sees no such device.
    """
    found = _core.torch_allocator(device)
    if found is None and not 0 <= device < torch.cuda.device_count():
        raise RuntimeError(
            f"Invalid device argument {device}: PyTorch sees {torch.cuda.device_count()} devices"
        )
    return found
