"""``LLM.beam_search`` against transformers' ``generate(num_beams=...)``, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.beam_cases import (
    LENGTHS,
    assert_equal,
    beam_llm,
    ids,
    prompts,
    run,
    search,
)
from tests.engine_cases import assert_nothing_left
from tests.models import FAMILIES, one_thread
from vattn.outputs import BeamSearchOutput
from vattn.sampling_params import SamplingParams

FEW = (33, 9, 80)  # lengths of prompts, where all would only take longer
SAME = search(ignore_eos=True, new=12)


def tokens(outputs: list[BeamSearchOutput]) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.sequences] for output in outputs]


# Equal to generate --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sequences_are_those_of_generate(family: str) -> None:
    """Eight prompts of as many lengths at once, four beams of each, some of which end early."""
    llm = beam_llm(family)
    outputs = run(llm, search())
    assert_equal(outputs, family, search())
    reasons = {each.finish_reason for output in outputs for each in output.sequences}
    assert reasons == {"stop", "length"}
    assert llm.stats().beams_moved > 0
    assert_nothing_left(llm)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_penalties_and_ends_are_those_of_generate(
    length_penalty: float, early_stopping: bool | str
) -> None:
    params = search(length_penalty=length_penalty, early_stopping=early_stopping)
    llm = beam_llm()
    outputs = run(llm, params, FEW)
    assert_equal(outputs, "llama", params, FEW)
    if early_stopping is True:
        assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert_nothing_left(llm)


@pytest.mark.parametrize("width", [2, 3, 9])
def test_widths_differ_in_one_batch(width: int) -> None:
    llm = beam_llm()
    others = [search(), search(width=width, ignore_eos=True), search(width=1)]
    with one_thread():
        outputs = llm.beam_search(ids([p for p in prompts() if len(p) in FEW]), others)
        greedy = llm.generate(
            ids([p for p in prompts() if len(p) in FEW])[2],
            SamplingParams(temperature=0, max_tokens=20),
            use_tqdm=False,
        )
    for output, params, length in zip(outputs[:2], others, LENGTHS_IN_ORDER, strict=False):
        assert_equal([output], "llama", params, (length,))
    # One beam is greedy, but that it goes on after an end as long as it could be better.
    (alone,) = outputs[2].sequences
    assert (
        alone.token_ids[: len(greedy[0].outputs[0].token_ids)][:3]
        == (greedy[0].outputs[0].token_ids[:3])
    )
    assert_nothing_left(llm)


LENGTHS_IN_ORDER = [n for n in LENGTHS if n in FEW]


# Whatever the engine does -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"async_scheduling": True, "prepare_ahead": False},
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": False, "async_scheduling": True, "max_num_seqs": 9},
        {"max_num_batched_tokens": 13, "max_num_seqs": 8},
        {"max_num_seqs": 4},  # one search at a time
        {"order": "token"},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
        {"max_num_seqs": 10, "scheduling_policy": "priority"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_beams_are_the_same_however_they_are_scheduled(
    family: str, options: dict[str, Any]
) -> None:
    llm = beam_llm(family, **options)
    assert_equal(run(llm, search()), family, search())
    assert_equal(run(llm, search()), family, search())  # with prefixes, where there is a cache
    assert_nothing_left(llm)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whole_groups_give_way_where_pages_are_short(
    family: str, prefixes: bool, is_async: bool
) -> None:
    """With a budget for two searches and a bit, eight take turns and lose what they had."""
    llm = beam_llm(
        family,
        kv_cache_memory_bytes=TIGHT[family],
        async_scheduling=is_async,
        enable_prefix_caching=prefixes,
        swap_space=1,
    )
    assert_equal(run(llm, search()), family, search())
    stats = llm.stats()
    assert stats.num_preemptions > 0
    assert stats.requests_swapped_out == 0  # beams are computed again, to share their pages again
    assert_nothing_left(llm)


TIGHT = {"llama": "420KiB", "gemma3": "420KiB"}


@pytest.mark.parametrize("is_async", [False, True])
def test_beams_that_cannot_be_moved_are_computed_again(is_async: bool) -> None:
    """Where pages are short for a reorder, the group gives way and goes on from what is known."""
    llm = beam_llm(async_scheduling=is_async)
    reorder, calls = llm.engine.memory.reorder, 0

    def sometimes(slots: list[int], sources: list[int]) -> bool:
        nonlocal calls
        calls += 1
        return calls % 7 not in (2, 3) and reorder(slots, sources)

    llm.engine.memory.reorder = sometimes  # type: ignore[method-assign]
    assert_equal(run(llm, search()), "llama", search())
    assert llm.stats().num_preemptions >= 4
    assert_nothing_left(llm)


@pytest.mark.parametrize("is_async", [False, True])
def test_searches_run_beside_sampled_requests(is_async: bool) -> None:
    """In the same steps, and what each gets is what it gets alone."""
    llm = beam_llm(async_scheduling=is_async, max_num_seqs=20)
    sampled = ids([prompt for prompt in prompts() if len(prompt) not in FEW])
    # Every other one is sampled only when its latest token has arrived.
    params = [
        SamplingParams(
            temperature=1, max_tokens=30, seed=i, n=2, repetition_penalty=1.3 if i % 2 else 1.0
        )
        for i in range(5)
    ]
    with one_thread():
        alone = llm.generate(sampled, params, use_tqdm=False)
        llm.reset_prefix_cache()
        stream = llm.stream(sampled, params)
        for _ in range(3):
            next(stream)
        assert_equal(run(llm, search(), FEW), "llama", search(), FEW)
        last = {output.request_id.rpartition("-")[2]: output for output in stream}
    beside = [last[str(number)] for number in range(5)]
    assert [[o.token_ids for o in output.outputs] for output in beside] == [
        [o.token_ids for o in output.outputs] for output in alone
    ]
    assert_nothing_left(llm)


def test_a_search_is_one_request_of_the_statistics() -> None:
    llm = beam_llm()
    outputs = run(llm, search(), FEW)
    stats = llm.stats()
    assert sum(stats.finished.values()) == len(FEW)
    assert stats.requests_forked == 6  # three beams of two; a prompt of 9 is sooner computed again
    assert stats.generation_tokens > 0
    for output in outputs:
        assert output.metrics.first_token_s > 0
        assert all(each.kv.pages > 0 for each in output.sequences)
    # A page has 64 tokens of a run: of the longest prompt the beams share one of each.
    assert all(each.kv.shared_pages > 0 for each in outputs[-1].sequences)
    again = run(llm, search(), FEW)
    assert [output.num_cached_tokens for output in again] == [32, 8, 79]
    assert_nothing_left(llm)
