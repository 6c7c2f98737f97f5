"""Virtually contiguous KV cache memory, mapped on demand.

Doors into one memory core; see docs/design.md:

* :class:`KVCache`: virtual K and V tensors, for people with a kernel or a policy of their own.
* :class:`VirtualCache`: a transformers cache for ``model.generate(past_key_values=...)``.
* :class:`PagePool`: the physical memory of a device, which caches can share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vattn._core import DriverError, InvariantError, OutOfPages, OutOfSlots

if TYPE_CHECKING:
    from vattn.hf.cache import VirtualCache
    from vattn.kv.cache import KVCache, Slot
    from vattn.kv.layout import LayerSpec
    from vattn.kv.pool import PagePool, PoolStats
    from vattn.kv.report import CacheStats, MemoryMap, PageState, SlotMap

__version__ = "0.1.0"

# torch and transformers take seconds to import, and `vattn --help` needs neither: what needs them
# is imported when it is first asked for.
_HOMES = {
    "CacheStats": "vattn.kv.report",
    "KVCache": "vattn.kv.cache",
    "LayerSpec": "vattn.kv.layout",
    "MemoryMap": "vattn.kv.report",
    "PagePool": "vattn.kv.pool",
    "PageState": "vattn.kv.report",
    "PoolStats": "vattn.kv.pool",
    "Slot": "vattn.kv.cache",
    "SlotMap": "vattn.kv.report",
    "VirtualCache": "vattn.hf.cache",
}

__all__ = [
    "CacheStats",
    "DriverError",
    "InvariantError",
    "KVCache",
    "LayerSpec",
    "MemoryMap",
    "OutOfPages",
    "OutOfSlots",
    "PagePool",
    "PageState",
    "PoolStats",
    "Slot",
    "SlotMap",
    "VirtualCache",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
