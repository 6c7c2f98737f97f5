"""Beam search on a real GPU: the sequences of `generate`, ahead, and where pages are short."""

from __future__ import annotations

from typing import Any

import pytest

import vattn
from tests.beam_cases import EOS, assert_equal, ids, prompts, search
from tests.engine_cases import assert_nothing_left, fresh_model
from tests.models import FAMILIES


def make(family: str, device: str, **options: Any) -> vattn.LLM:
    model = fresh_model(family)
    model.generation_config.eos_token_id = list(EOS)
    options = {
        "dtype": "float32",
        "device": device,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": "4GiB",
        **options,
    }
    return vattn.LLM(model, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 32, "max_num_seqs": 9},
        {"enable_prefix_caching": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_all_sequences_are_those_of_generate(
    family: str, options: dict[str, Any], device: str
) -> None:
    with make(family, device, **options) as llm:
        for _ in range(2):  # the second time with prefix hits
            assert_equal(llm.beam_search(ids(prompts()), search()), family, search())
        assert llm.stats().beams_moved > 0
        assert_nothing_left(llm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whole_groups_give_way_where_pages_are_short(family: str, device: str) -> None:
    with make(family, device) as probe:
        page, layout = probe.engine.cache.pool.page_bytes, probe.engine.cache.layout
    runs = sum(region.runs for region in layout.regions)
    # Two beams more than one search has, each with a page per run.
    with make(family, device, kv_cache_memory_bytes=6 * runs * page) as llm:
        assert_equal(llm.beam_search(ids(prompts()), search()), family, search())
        assert_nothing_left(llm)


def test_wide_beams_share_a_long_prompt(device: str) -> None:
    """Full pages of the prompt are there once, and tails are copied on the device."""
    with make("llama", device, max_model_len=1024) as llm:
        prompt = [3 + i % 90 for i in range(900)]
        (output,) = llm.beam_search([{"prompt_token_ids": prompt}], search(8, 64, ignore_eos=True))
        assert output.error is None
        assert len(output.sequences) == 8
        stats = llm.stats()
        assert stats.requests_forked == 7
        assert stats.cache.copied_bytes > 0
        (again,) = llm.beam_search([{"prompt_token_ids": prompt}], search(8, 64, ignore_eos=True))
        assert [s.token_ids for s in again.sequences] == [s.token_ids for s in output.sequences]
        assert_nothing_left(llm)
