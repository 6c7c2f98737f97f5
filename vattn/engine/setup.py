"""What an engine is made of, from its settings: lengths, memory, layout, the forward pass."""

from __future__ import annotations

from typing import Any

import torch

from vattn.attention.base import Backend
from vattn.attention.select import choose
from vattn.config import format_bytes, parse_bytes
from vattn.engine.config import EngineConfig
from vattn.engine.graphs import can_capture
from vattn.engine.memory import MemoryManager
from vattn.engine.runner import ModelRunner
from vattn.engine.storage import Storage, StorageNeeds
from vattn.hf.compiled import COMPILE_DEFAULT, compile_model
from vattn.hf.model import LoadedModel
from vattn.kv.cache import KVCache
from vattn.kv.pool import PagePool, open_driver, shared_pool
from vattn.kv.swap import SwapSpace

# Slots beside those that may run, to keep finished sequences as prefix cache: addresses only.
_KEPT_SLOTS_PER_SEQ = 3
_MIN_KEPT_SLOTS = 64
# On a GPU, pages are created ahead of need, in the background: creating one costs as much as fifty
# mappings, and a batch that fills up wants gigabytes in a second.
AHEAD_BYTES = {"cpu": 0, "cuda": 4 << 30}
# Beside a GPU; on a CPU it would be the same memory.
_SWAP_GIB = {"cpu": 0.0, "cuda": 4.0}


def model_forward(loaded: LoadedModel, config: EngineConfig) -> Any:
    """The compiled model, if it is to be compiled; None for the model as it is."""
    wanted = config.compile_model
    if wanted is None:
        wanted = COMPILE_DEFAULT[loaded.device.type] and not config.enforce_eager
    return compile_model(loaded) if wanted else None


def max_model_len(loaded: LoadedModel, config: EngineConfig) -> int:
    """Longest sequence in tokens: as asked for, or what the model was made for."""
    limit, asked = loaded.max_positions, config.max_model_len
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(
            f"max_model_len={asked} is beyond the {limit} positions that the model was made for"
        )
    if asked is None and limit is None:
        raise ValueError("the model does not say how long it can get; give max_model_len")
    length = asked if asked is not None else limit
    assert length is not None
    return length


def virtual_storage(needs: StorageNeeds) -> Storage:
    """Slots that are contiguous in virtual memory, and the first kernel that can serve the model.

    Raises:
        ValueError: settings that the model, the device or the pool given cannot meet.
    """
    loaded, config, pool = needs.loaded, needs.config, needs.pool
    backend = choose(loaded.specs, loaded.device, config.order, name=config.attention_backend)
    if pool is None:
        pool = make_pool(loaded.device, config)
    else:
        check_pool(pool, loaded, config)
    graphs = not config.enforce_eager and backend.graphs and can_capture(loaded.device)
    # With tokens in flight a sequence keeps its slot for a step longer than it is computed.
    spare = graphs + needs.steps_in_flight * config.max_num_seqs
    cache = make_cache(loaded, config, needs.max_model_len, backend, pool, spare)
    return Storage(backend, cache, make_memory(cache, config, graphs=graphs), graphs, pool)


def make_pool(device: torch.device, config: EngineConfig) -> PagePool:
    """Physical memory of the engine's own, or that of all under ``vattn.allocator.enable()``."""
    shared = shared_pool(
        device,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        page_bytes=config.page_bytes,
        strict=config.strict,
    )
    if shared is not None:
        return shared
    driver = open_driver(device, strict=config.strict)
    return PagePool(
        device,
        driver=driver,
        page_bytes=config.page_bytes,
        budget_bytes=asked_budget_bytes(config, driver),
        ahead_bytes=AHEAD_BYTES[device.type],
    )


def check_pool(pool: PagePool, loaded: LoadedModel, config: EngineConfig) -> None:
    """Refuses a pool that a user gave if it cannot be the engine's, or settings that are its own.

    Raises:
        ValueError: says which.
    """
    if (
        config.page_bytes
        or config.kv_cache_memory_bytes
        or config.strict
        or config.gpu_memory_utilization
    ):
        raise ValueError(
            "page_bytes, kv_cache_memory_bytes, gpu_memory_utilization and strict belong to the "
            "pool given"
        )
    if pool.device != loaded.device:
        raise ValueError(
            f"the pool given is on {pool.device}, and the model on {loaded.device}; make them agree"
        )


def make_cache(
    loaded: LoadedModel,
    config: EngineConfig,
    tokens: int,
    backend: Backend,
    pool: PagePool,
    spare: int,
) -> KVCache:
    """The KV cache, with as many slots for kept sequences as kernels can address."""
    kept = kept_slots(config)
    choices = [kept, kept // 2, kept // 4, 0] if kept else [0]
    for extra in choices:
        try:
            return KVCache(
                loaded.layer_specs(),
                max_seqs=config.max_num_seqs + extra + spare,
                max_tokens=tokens,
                pool=pool,
                order=config.order or backend.order,
                layers_per_region=config.layers_per_region,
                kv_tile_tokens=backend.kv_tile_tokens,
            )
        except ValueError:
            if extra == 0:
                raise
    raise AssertionError("unreachable")


def kept_slots(config: EngineConfig) -> int:
    """How many finished sequences the cache has slots for, beside those that run."""
    if not config.enable_prefix_caching:
        return 0
    return max(_MIN_KEPT_SLOTS, _KEPT_SLOTS_PER_SEQ * config.max_num_seqs)


def make_memory(cache: KVCache, config: EngineConfig, *, graphs: bool) -> MemoryManager:
    """Who decides over the cache's slots, with host memory for those who give way."""
    swap_gib = config.swap_space
    if swap_gib is None:
        swap_gib = _SWAP_GIB[cache.device.type]
    return MemoryManager(
        cache,
        prefix_caching=config.enable_prefix_caching,
        swap=SwapSpace(int(swap_gib * 2**30), pinned=cache.device.type == "cuda"),
        scratch=graphs,
        eviction=config.eviction_policy,
    )


def make_runner(
    loaded: LoadedModel,
    config: EngineConfig,
    cache: KVCache,
    backend: Backend,
    *,
    max_model_len: int,
    scratch_slot: int | None,
    graphs: bool,
) -> ModelRunner:
    """Runs the model over the cache; captures no graphs yet."""
    return ModelRunner(
        loaded,
        cache,
        backend,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        scratch_slot=scratch_slot,
        capture_sizes=config.cudagraph_capture_sizes,
        graphs=graphs,
        forward=model_forward(loaded, config),
    )


def asked_budget_bytes(config: EngineConfig, driver: Any) -> int | None:
    """The KV cache's budget, as the settings ask for it; None for the pool's default."""
    if config.kv_cache_memory_bytes is not None:
        return parse_bytes(config.kv_cache_memory_bytes, "kv_cache_memory_bytes")
    share = config.gpu_memory_utilization
    if share is None:
        return None
    free, total = driver.memory_info()
    budget: int = int(total * share) - (total - free)
    if budget <= 0:
        raise ValueError(
            f"gpu_memory_utilization={share} of {format_bytes(total)} leaves nothing for the KV "
            f"cache: {format_bytes(total - free)} are in use; raise it, or free memory"
        )
    return budget
