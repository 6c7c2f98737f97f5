"""Engines that differ in their memory alone: contiguous slots, or blocks behind a table.

A side is named by a text: ``contiguous``, ``contiguous:<backend>``, ``paged``, ``paged:<kernel>``,
``paged:<kernel>:<block tokens>``. What is left out is chosen by the engine; levels choose the block
size by a sweep. Scheduler, model, sampler and runner of all sides are the same code, and the
weights the same tensors: an engine owns the attention of its model, not the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.common import Json
from vattn import LLM
from vattn.attention.select import BACKENDS
from vattn.engine.setup import virtual_storage
from vattn.engine.storage import MakeStorage

# The contiguous kernel of the library that a paged kernel is of, so that only memory differs. None:
# the library has none that reads slots, and the engine takes its first choice.
SAME_LIBRARY: dict[str, str | None] = {
    "sdpa-gather": "sdpa",
    "sdpa-gather-whole": "sdpa",
    "torch": "torch",
    "fa2": "flash_attn_2",
    "fa3": "flash_attn_3",
    "vllm-fa2": "vllm_flash_attn_2",
    "vllm-fa3": "vllm_flash_attn_3",
    "flashinfer": None,
}


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        kind: ``"contiguous"`` or ``"paged"``.
        kernel: contiguous: an attention backend of the engine; paged: a kernel of
            :data:`SAME_LIBRARY`. None for the first that can serve.
        block_tokens: of a paged side; None for that of ``bench.paged.select.BEST_BLOCK``, which is
            not measured on GPUs: levels measure it first, with :mod:`bench.levels.block_sweep`.
    """

    kind: str
    kernel: str | None = None
    block_tokens: int | None = None

    def __str__(self) -> str:
        words = [self.kind, self.kernel or "", str(self.block_tokens or "")]
        return ":".join(words).rstrip(":")


@dataclass(frozen=True)
class EngineSettings:
    """What is the same on all sides.

    Args:
        max_model_len: longest prompt and output together, in tokens.
        max_num_seqs: requests that run at once.
        budget_bytes: of the KV cache.
        step_tokens: computed in one step at most; None for the engine's default.
        prefix_caching: finished requests leave their K and V to those that begin alike.
        eager: no CUDA graphs.
    """

    max_model_len: int
    max_num_seqs: int
    budget_bytes: int
    step_tokens: int | None = None
    prefix_caching: bool = True
    eager: bool = False

    def options(self) -> Json:
        """As options of :class:`vattn.LLM`."""
        return {
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.budget_bytes,
            "max_num_batched_tokens": self.step_tokens,
            "enable_prefix_caching": self.prefix_caching,
            "enforce_eager": self.eager,
            # Blocks are not swapped, so pages are not: who gives way is computed again.
            "swap_space": 0,
        }


def parse_side(text: str) -> Side:
    """A side from its name.

    Raises:
        ValueError: no such kind or kernel, or a block size that is no positive number.
    """
    kind, _, rest = text.partition(":")
    kernel, _, block = rest.partition(":")
    known: Sequence[str] = {"contiguous": [*BACKENDS], "paged": [*SAME_LIBRARY]}.get(kind, [])
    if not known:
        raise ValueError(f"side {text!r} must begin with contiguous or paged")
    if kernel and kernel not in known:
        raise ValueError(f"side {text!r}: {kernel!r} is not one of {', '.join(known)}")
    if block and (kind == "contiguous" or not block.isdigit() or int(block) == 0):
        raise ValueError(
            f"side {text!r}: only a paged side has a block size, a positive number of tokens"
        )
    return Side(kind, kernel or None, int(block) if block else None)


def contiguous_for(paged: Side) -> Side:
    """The contiguous side to compare with a paged one: the same kernel library where it has one."""
    if paged.kernel is None:
        return Side("contiguous")
    return Side("contiguous", SAME_LIBRARY[paged.kernel])


def storage_of(side: Side) -> MakeStorage:
    """Where the engine of a side keeps K and V."""
    if side.kind == "contiguous":
        return virtual_storage
    from bench.paged.storage import paged_storage

    return paged_storage(side.block_tokens, side.kernel)


def open_engine(side: Side | str, model: Any, settings: EngineSettings, **options: Any) -> LLM:
    """The engine of one side.

    Args:
        side: or its name.
        model: a transformers model; several engines may serve the same object.
        settings: of all sides.
        options: more of :class:`vattn.LLM`.

    Raises:
        ValueError: a side that does not exist, or cannot serve the model here; the reason is in it.
    """
    side = parse_side(side) if isinstance(side, str) else side
    if side.kind == "contiguous" and side.kernel is not None:
        options = {"attention_backend": side.kernel} | options
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        storage=storage_of(side),
        **(settings.options() | options),
    )


@contextmanager
def open_sides(
    sides: Sequence[Side | str], model: Any, settings: EngineSettings, **options: Any
) -> Iterator[dict[str, LLM]]:
    """The engines of several sides, by their names, for the length of the block.

    If some of them can be captured in CUDA graphs and others cannot, none are: launches are not
    what is compared.

    Raises:
        ValueError: as :func:`open_engine`.
    """
    known = [parse_side(side) if isinstance(side, str) else side for side in sides]
    with ExitStack() as stack:

        def opened(side: Side, settings: EngineSettings) -> LLM:
            return stack.enter_context(open_engine(side, model, settings, **options))

        engines = {str(side): opened(side, settings) for side in known}
        graphs = {name: has_graphs(llm) for name, llm in engines.items()}
        if any(graphs.values()) and not all(graphs.values()):
            eager = replace(settings, eager=True)
            for side in [side for side in known if graphs[str(side)]]:
                engines[str(side)].close()
                engines[str(side)] = opened(side, eager)
        yield engines


def has_graphs(llm: LLM) -> bool:
    """Whether decode steps of an engine may be launched as CUDA graphs."""
    return llm.engine.runner.graph_stats.captured > 0


def how_it_ran(llm: LLM) -> Json:
    """What an engine has decided for itself, and what its memory did so far."""
    engine, stats = llm.engine, llm.stats()
    return {
        "attention": engine.runner._backend.name,
        "graphs": asdict(engine.runner.graph_stats),
        "asynchronous": bool(engine.is_async),
        "block_tokens": getattr(engine.cache, "block_tokens", None),
        "budget_bytes": stats.cache.budget_bytes,
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "driver_calls": dict(stats.cache.driver_calls),
    }


def kv_budget(model: Any, tokens: int) -> int:
    """Bytes of K and V of so many tokens of a model, rounded up to MiB."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dtype: torch.dtype = model.dtype
    per_token: int = 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
    return -(-tokens * per_token // (1 << 20)) << 20
