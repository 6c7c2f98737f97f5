"""The paged baseline as an engine's storage: ``LLM(model, storage=paged_storage())``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.paged.cache import PagedCache
from bench.paged.memory import PagedMemory
from bench.paged.select import BEST_BLOCK, choose_paged
from vattn.config import format_bytes, positive_int
from vattn.engine.config import EngineConfig
from vattn.engine.graphs import can_capture
from vattn.engine.setup import asked_budget_bytes, kept_slots
from vattn.engine.storage import MakeStorage, Storage, StorageNeeds
from vattn.kv.pool import default_budget_bytes, open_driver

# Settings of the contiguous side, with the values that mean nothing, and what to do instead.
_FOREIGN = {
    "page_bytes": (None, "give block_tokens to paged_storage"),
    "order": (None, "it follows from the kernel"),
    "layers_per_region": (None, "a block has all layers"),
    "strict": (False, "ordinary memory has no holes"),
    "attention_backend": (None, "give kernel to paged_storage"),
    "swap_space": (0, "who gives way is computed again"),
    "eviction_policy": (None, "the block that was free longest goes first"),
}


def paged_storage(block_tokens: int | None = None, kernel: str | None = None) -> MakeStorage:
    """Blocks and block tables in place of contiguous slots; everything else stays the same.

    Args:
        block_tokens: tokens of a block; None for what is best for the kernel.
        kernel: by name; None for the first that can serve the model.

    Returns:
        For ``LLM(..., storage=...)``. It raises ValueError for settings that cannot apply, a budget
        that has no room for two blocks or is more than can be allocated, and models or kernels that
        cannot be.

    Raises:
        ValueError: ``block_tokens`` is not a positive number.
    """
    if block_tokens is not None:
        positive_int(block_tokens, "block_tokens", ", or None for the kernel's best")

    def make(needs: StorageNeeds) -> Storage:
        return _make(needs, block_tokens, kernel)

    return make


def _make(needs: StorageNeeds, block_tokens: int | None, kernel: str | None) -> Storage:
    loaded, config = needs.loaded, needs.config
    _refuse_foreign(needs)
    backend = choose_paged(loaded.specs, loaded.device, kernel)
    graphs = not config.enforce_eager and backend.graphs and can_capture(loaded.device)
    # With tokens in flight a sequence keeps its slot for a step longer than it is computed.
    slots = config.max_num_seqs * (1 + needs.steps_in_flight) + graphs
    size = block_tokens or BEST_BLOCK[backend.name]
    backend.check_block(size)
    specs = loaded.layer_specs()
    block_bytes = size * sum(spec.token_bytes for spec in specs)
    budget = _budget_bytes(needs)
    # More than this the contiguous side could not use either.
    most = (slots + kept_slots(config)) * -(-needs.max_model_len // size) + 1
    blocks = min(budget // block_bytes, most)
    if blocks < 2:
        raise ValueError(
            f"a budget of {format_bytes(budget)} has no room for two blocks of {size} tokens, "
            f"{format_bytes(block_bytes)} each; raise kv_cache_memory_bytes or lower block_tokens"
        )
    cache = _allocated(
        lambda: PagedCache(
            specs,
            device=loaded.device,
            max_seqs=slots,
            max_tokens=needs.max_model_len,
            num_blocks=blocks,
            block_tokens=size,
            order=backend.order or "token",
        ),
        blocks * block_bytes,
    )
    memory = PagedMemory(
        cache,
        prefix_caching=config.enable_prefix_caching,
        scratch=graphs,
        budget_bytes=budget,
    )
    return Storage(backend, cache, memory, graphs)


def _allocated(make: Callable[[], PagedCache], needed_bytes: int) -> PagedCache:
    """Unlike pages, which are mapped when they are needed, all blocks are there from the start."""
    try:
        return make()
    except RuntimeError as error:  # on a CPU it has no type of its own
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ValueError(
                f"blocks of {format_bytes(needed_bytes)} in all do not fit, and a paged cache "
                f"allocates all of them at once: {text}; lower kv_cache_memory_bytes or "
                "max_num_seqs"
            ) from error
        raise


def _budget_bytes(needs: StorageNeeds) -> int:
    """As the contiguous side has it, from the same settings."""
    driver = open_driver(needs.loaded.device)
    asked = asked_budget_bytes(needs.config, driver)
    return default_budget_bytes(needs.loaded.device.type, driver) if asked is None else asked


def _refuse_foreign(needs: StorageNeeds) -> None:
    config: EngineConfig = needs.config
    for name, (unset, remedy) in _FOREIGN.items():
        value = getattr(config, name)
        if value is not None and value != unset:
            raise ValueError(
                f"{name}={value!r} does not apply to a paged cache: {remedy}; leave it out"
            )
    if needs.pool is not None:
        raise ValueError(
            "a paged cache is ordinary memory of torch and has no use for the pool given; leave it "
            "out, and give kv_cache_memory_bytes"
        )
