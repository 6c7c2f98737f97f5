"""Where an engine keeps K and V: the seam between scheduling and memory.

An engine is given three things that fit each other: a cache, an attention backend that reads it,
and a memory manager that decides over it. :func:`vattn.engine.setup.virtual_storage` makes ours.
Whoever brings others, to compare them or to try a policy, writes a function like it and passes it
as ``LLM(..., storage=function)``; scheduler, model, sampler and requests stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vattn.attention.base import Backend
from vattn.engine.config import EngineConfig
from vattn.engine.holdings import MemoryCounters
from vattn.engine.policy import Memory
from vattn.engine.speculation.proposer import Proposer
from vattn.hf.model import LoadedModel
from vattn.kv.layout import LayerSpec, Layout
from vattn.kv.pool import PagePool
from vattn.kv.report import CacheStats
from vattn.request import Request


class EngineCache(Protocol):
    """What the engine itself asks of a cache; a backend may ask for more.

    A slot stands for one sequence. Which addresses its tokens have is between cache and backend.
    """

    @property
    def specs(self) -> Sequence[LayerSpec]:
        """Of the layers, as ``LoadedModel.layer_specs()`` gives them."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the tensors."""
        ...

    @property
    def max_seqs(self) -> int:
        """Number of slots."""
        ...

    @property
    def layout(self) -> Layout:
        """Its regions; of one that has none, an empty list."""
        ...

    def stats(self) -> CacheStats:
        """Figures of this moment."""
        ...

    def close(self) -> None:
        """Gives its memory back."""
        ...


class EngineMemory(Memory, Protocol):
    """What the engine asks of a memory manager beside what its scheduler does."""

    scratch_slot: int | None
    proposer: Proposer | None
    counters: MemoryCounters

    @property
    def swap_used_bytes(self) -> int:
        """Host memory of those that were swapped out."""
        ...

    def last_prompt_tokens(self, decodes: list[Request]) -> int:
        """How many of the decodes of a step compute the last token of a prompt."""
        ...

    def index_prompts(self) -> None:
        """Called after each launch: what it computes of prompts may be shared from now on."""
        ...

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the budget while running."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets what is kept of finished requests; running ones go on."""
        ...

    def lose_all(self) -> None:
        """Gives back every slot and keeps nothing, whatever state an interruption has left."""
        ...

    def check(self) -> None:
        """Verifies its invariants and those of the cache."""
        ...

    def ask_no_more(self) -> None:
        """Called before the engine closes: nothing will be kept, so no policy is asked any more."""
        ...

    def close(self) -> None:
        """Ends what it does in the background."""
        ...


@dataclass(frozen=True)
class StorageNeeds:
    """What an engine asks for.

    Args:
        loaded: the model.
        config: settings of the engine.
        max_model_len: longest sequence in tokens.
        steps_in_flight: launched steps whose tokens may be missing when the next is scheduled: a
            sequence that has ended keeps its slot for so many steps longer.
        pool: physical memory that the user gave; None for one of its own.
    """

    loaded: LoadedModel
    config: EngineConfig
    max_model_len: int
    steps_in_flight: int
    pool: PagePool | None = None


@dataclass(frozen=True)
class Storage:
    """What an engine is given.

    Args:
        backend: computes attention over the cache and writes new K and V to it.
        cache: of the model's layers.
        memory: decides over the cache's slots.
        graphs: decode steps may be captured as CUDA graphs; ``memory.scratch_slot`` is set then.
        pool: where the cache's pages come from, for a draft model's; None if it has no pages.
    """

    backend: Backend
    cache: EngineCache
    memory: EngineMemory
    graphs: bool
    pool: PagePool | None = None


MakeStorage = Callable[[StorageNeeds], Storage]
