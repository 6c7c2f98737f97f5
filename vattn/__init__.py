"""Virtually contiguous KV cache memory, mapped on demand.

Doors into one memory core; see docs/design.md:

* :class:`LLM`: many requests at once through a transformers model.
* :class:`KVCache`: virtual K and V tensors, for people with a kernel or a policy of their own.
* :class:`VirtualCache`: a transformers cache for ``model.generate(past_key_values=...)``.
* :func:`reserve`: a tensor whose rows get memory when they are committed.
* :mod:`vattn.allocator`: all of PyTorch's CUDA memory, or parts of it, from the same pages.
* :class:`PagePool`: the physical memory of a device, which all of these can share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vattn._core import DriverError, InvariantError, OutOfPages, OutOfSlots, PagesGone
from vattn.version import __version__

if TYPE_CHECKING:
    from vattn import allocator
    from vattn.async_llm import AsyncLLM
    from vattn.engine.eviction import EvictionPolicy, KeptSequence, PolicyError
    from vattn.engine.ranks import RankFunction
    from vattn.engine_process.errors import EngineDeadError, RequestRefused
    from vattn.hf.cache import VirtualCache
    from vattn.kv.cache import KVCache
    from vattn.kv.layout import LayerSpec
    from vattn.kv.pool import PagePool, PoolStats
    from vattn.kv.report import CacheStats, MemoryMap, PageState, SlotMap
    from vattn.kv.slots import Slot
    from vattn.llm import LLM
    from vattn.metrics import EngineStats
    from vattn.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        KVUsage,
        Logprob,
        RequestOutput,
    )
    from vattn.request import Request
    from vattn.sampling_params import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )
    from vattn.virtual_tensor import VirtualTensor, reserve

# torch and transformers take seconds to import, and `vattn --help` needs neither: what needs them
# is imported when it is first asked for.
_HOMES = {
    "StructuredOutputsParams": "vattn.sampling_params",
    "BeamSearchParams": "vattn.sampling_params",
    "KVUsage": "vattn.outputs",
    "BeamSearchSequence": "vattn.outputs",
    "BeamSearchOutput": "vattn.outputs",
    "CacheStats": "vattn.kv.report",
    "CompletionOutput": "vattn.outputs",
    "EngineStats": "vattn.metrics",
    "EvictionPolicy": "vattn.engine.eviction",
    "KeptSequence": "vattn.engine.eviction",
    "PolicyError": "vattn.engine.eviction",
    "KVCache": "vattn.kv.cache",
    "AsyncLLM": "vattn.async_llm",
    "EngineDeadError": "vattn.engine_process.errors",
    "RequestRefused": "vattn.engine_process.errors",
    "LLM": "vattn.llm",
    "LayerSpec": "vattn.kv.layout",
    "Logprob": "vattn.outputs",
    "MemoryMap": "vattn.kv.report",
    "RequestOutputKind": "vattn.sampling_params",
    "PagePool": "vattn.kv.pool",
    "PageState": "vattn.kv.report",
    "PoolStats": "vattn.kv.pool",
    "RankFunction": "vattn.engine.ranks",
    "Request": "vattn.request",
    "RequestOutput": "vattn.outputs",
    "SamplingParams": "vattn.sampling_params",
    "Slot": "vattn.kv.slots",
    "SlotMap": "vattn.kv.report",
    "VirtualCache": "vattn.hf.cache",
    "VirtualTensor": "vattn.virtual_tensor",
    "reserve": "vattn.virtual_tensor",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CacheStats",
    "CompletionOutput",
    "DriverError",
    "EngineDeadError",
    "EngineStats",
    "EvictionPolicy",
    "InvariantError",
    "KVCache",
    "KVUsage",
    "KeptSequence",
    "LayerSpec",
    "Logprob",
    "MemoryMap",
    "OutOfPages",
    "OutOfSlots",
    "PagePool",
    "PageState",
    "PagesGone",
    "PolicyError",
    "PoolStats",
    "RankFunction",
    "Request",
    "RequestOutput",
    "RequestOutputKind",
    "RequestRefused",
    "SamplingParams",
    "Slot",
    "SlotMap",
    "StructuredOutputsParams",
    "VirtualCache",
    "VirtualTensor",
    "__version__",
    "allocator",
    "reserve",
]


def __getattr__(name: str) -> Any:
    if name == "allocator":
        return import_module("vattn.allocator")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
