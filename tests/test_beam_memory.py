"""What beams take of the KV cache, and what they copy: counted after every step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import vattn
from tests.engine_cases import PAGE, assert_nothing_left
from tests.models import CONFIGS, VOCABULARY, make_model, one_thread
from vattn.kv.report import CacheStats
from vattn.sampling_params import BeamSearchParams

WIDTH = 8
PROMPT = 2048
NEW = 96


@dataclass(frozen=True)
class Moment:
    """After one step: how long the beams are, and the cache's figures."""

    length: int
    stats: CacheStats


@pytest.fixture(scope="module")
def searched() -> tuple[list[Moment], Any]:
    """Every step of a search of width 8 for a prompt of 2K tokens, and its engine's cache."""
    config: Any = CONFIGS["llama"]()
    config.max_position_embeddings = 4096
    assert isinstance(config, LlamaConfig)
    llm = vattn.LLM(
        make_model(config),
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=PROMPT + NEW,
        max_num_seqs=WIDTH,
        page_bytes=PAGE,
        strict=True,
        kv_cache_memory_bytes="64MiB",
    )
    moments: list[Moment] = []
    step = llm.engine.step

    def counted() -> list[Any]:
        news = step()
        running = list(llm.engine.scheduler._running)
        llm.engine.check()
        if len(running) == WIDTH:
            length = min(beam.computed for beam in running)
            moments.append(Moment(length, llm.engine.cache.stats()))
        return news

    llm.engine.step = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(2, VOCABULARY, (PROMPT,), generator=generator).tolist()
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=NEW, ignore_eos=True)
    with one_thread():
        (output,) = llm.beam_search({"prompt_token_ids": prompt}, params)
    assert output.error is None
    assert len(output.sequences) == WIDTH
    assert llm.stats().requests_forked == WIDTH - 1
    assert len(moments) >= NEW - 2
    cache = llm.engine.cache
    assert_nothing_left(llm)
    return moments, cache


def runs(cache: Any) -> int:
    return sum(region.runs for region in cache.layout.regions)


def pages(cache: Any, tokens: int) -> int:
    """Of one sequence by itself."""
    return sum(
        region.runs * -(-tokens * region.token_bytes // PAGE) for region in cache.layout.regions
    )


def full_pages(cache: Any, tokens: int) -> int:
    """Those that it fills."""
    return sum(
        region.runs * (tokens * region.token_bytes // PAGE) for region in cache.layout.regions
    )


def test_beams_take_what_one_sequence_takes_and_their_own_tails(
    searched: tuple[list[Moment], Any],
) -> None:
    moments, cache = searched
    for moment in moments:
        stats = moment.stats
        physical = stats.live_bytes + stats.cover_bytes + stats.scratch_bytes
        tail = pages(cache, moment.length) - full_pages(cache, PROMPT)  # if nothing of it is shared
        assert physical <= 1.15 * pages(cache, moment.length) * PAGE + WIDTH * tail * PAGE
        assert stats.live_bytes <= (pages(cache, moment.length) + WIDTH * tail) * PAGE
    # And all beams together: eight times as much without sharing.
    last = moments[-1].stats
    assert last.live_bytes < 0.3 * WIDTH * pages(cache, moments[-1].length) * PAGE


def test_a_step_copies_less_than_a_page_per_run_and_beam(
    searched: tuple[list[Moment], Any],
) -> None:
    moments, cache = searched
    copied = [
        after.stats.copied_bytes - before.stats.copied_bytes
        for before, after in itertools.pairwise(moments)
    ]
    assert max(copied) < WIDTH * runs(cache) * PAGE
    assert sum(copied) > 0
    assert 0 in copied  # in steps where every beam goes on, nothing is
