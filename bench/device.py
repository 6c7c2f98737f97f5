"""Clock, caches, memory and bandwidth of the device that a benchmark runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import wall_clock
from vattn import _core

cuda: Any = torch.cuda  # parts of it are untyped


def device_clock(function: Callable[[], object]) -> float:
    """Seconds on the device, by events around the work."""
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def last_level_cache_bytes(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(caches[-1].read_text().strip()[:-1]) * 1024 if caches else 32 << 20


def free_bytes(device: str) -> int:
    """What a benchmark may take: most of a GPU's free memory, half of a host's."""
    if device != "cpu":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    return int(0.5 * _core.host_driver().memory_info()[0])


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, bytes read plus bytes written."""
    size = (1 << 30) if device != "cpu" else 256 << 20
    low, high = -(2**63), 2**63 - 1
    source = torch.randint(low, high, (size // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    clock = wall_clock if device == "cpu" else device_clock
    times = sorted(clock(lambda: target.copy_(source)) for _ in range(11))
    return 2 * size / times[len(times) // 2]
