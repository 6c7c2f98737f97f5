"""Engines over the paged baseline, as tests want them."""

from __future__ import annotations

from typing import Any

import vattn
from bench.paged.memory import PagedMemory
from bench.paged.storage import paged_storage
from tests.engine_cases import make_llm
from tests.paged_model import assert_no_block_lost

UNSET: dict[str, Any] = {"page_bytes": None, "strict": False}  # of the contiguous side
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}


def paged(family: str = "llama", block_tokens: int | None = 8, **options: Any) -> vattn.LLM:
    return make_llm(family, storage=paged_storage(block_tokens), **{**UNSET, **options})


def memory_of(llm: vattn.LLM) -> PagedMemory:
    memory: Any = llm.engine.memory
    assert isinstance(memory, PagedMemory)
    return memory


def finish(llm: vattn.LLM) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache.open_slots) == (0, 0, 0)
    assert stats.cache.live_bytes == 0
    assert_no_block_lost(memory_of(llm))
    llm.engine.close()
