"""Virtually contiguous KV cache memory, mapped on demand.

Four doors into one memory core; see docs/design.md:

* :class:`KVCache`: virtual K and V tensors, for people with a kernel or a policy of their own.
* :class:`VirtualCache`: a transformers cache for ``model.generate(past_key_values=...)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vattn._core import DriverError, InvariantError, OutOfPages, OutOfSlots
from vattn.kv.cache import KVCache, Slot
from vattn.kv.layout import LayerSpec
from vattn.kv.pool import PagePool, PoolStats
from vattn.kv.report import CacheStats, MemoryMap, PageState, SlotMap

if TYPE_CHECKING:
    from vattn.hf.cache import VirtualCache

__version__ = "0.1.0"

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
    # transformers takes seconds to import, and only VirtualCache needs it.
    if name == "VirtualCache":
        from vattn.hf.cache import VirtualCache

        return VirtualCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
