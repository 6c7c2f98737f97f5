"""CUDA graphs of decode steps: what eager steps give, while pages change beneath the graphs.

A graph's attention is split for the longest sequence of its bucket and an eager step's for the one
that it has, so log probabilities are close and not equal. Two runs of one engine are equal: same
kernels, same splits, same order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import greedy
from tests.gpu.engine_runs import (
    CAPTURED,
    CLOSE,
    PAGE,
    TOKENS_PER_PAGE,
    assert_close_to_model,
    assert_graphed,
    cases,
    engine,
    generate,
    logprobs_of,
    tokens_of,
)
from vattn.attention.select import BACKENDS

EVERY = pytest.mark.parametrize("backend", BACKENDS)
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])


@AHEAD
@EVERY
def test_decodes_go_through_graphs(backend: str, ahead: bool, device: str) -> None:
    requests = cases(12, new=24)
    graphed = device == "cuda" and BACKENDS[backend].graphs
    options: dict[str, Any] = {} if graphed else {"enforce_eager": True}
    with engine(device, attention_backend=backend, async_scheduling=ahead, **options) as llm:
        captured = llm.stats().graphs_captured
        assert captured == (len(CAPTURED) if graphed else 0)  # of one length
        assert llm.stats().steps_by_graph == 0
        for _ in range(2):  # the second time with prefix hits
            before = llm.stats().steps_by_graph
            assert_close_to_model(generate(llm, requests), requests, device)
            # All but the steps with a chunk in them: every answer has 23 decodes.
            assert (llm.stats().steps_by_graph - before >= 20) == graphed
        assert llm.stats().prefix_cache_hits > 0
        assert llm.stats().graphs_captured == captured  # none while it runs


@EVERY
def test_eager_steps_and_graphs_agree(backend: str, device: str) -> None:
    if device == "cuda" and not BACKENDS[backend].graphs:
        pytest.skip(f"{backend} has no graphs")
    (request,) = cases(1, new=16)
    found = []
    for eager in (False, True):
        with engine(device, attention_backend=backend, enforce_eager=eager) as llm:
            found += generate(llm, [request])
            assert (llm.stats().steps_by_graph > 0) == (device == "cuda" and not eager)
    one, other = found
    # Up to where bf16 may have chosen otherwise; the first token comes of a chunk by both.
    pairs = list(zip(one.token_ids, other.token_ids, strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    assert same >= 1
    assert (logprobs_of(one)[:same] - logprobs_of(other)[:same]).abs().max() < 2 * CLOSE


@AHEAD
def test_the_same_requests_give_the_same_tokens_on_other_pages(ahead: bool, device: str) -> None:
    requests = cases(8, new=24)
    with engine(device, enable_prefix_caching=False, async_scheduling=ahead) as llm:
        first = tokens_of(generate(llm, requests))
        llm.engine.cache.trim()  # every page goes back, and others come
        before = llm.engine.cache.pool.stats().pages_created_total
        assert tokens_of(generate(llm, requests)) == first
        assert llm.engine.cache.pool.stats().pages_created_total > before
        assert_graphed(llm, device)


@AHEAD
@pytest.mark.parametrize("swap", [0, 0.25], ids=["recompute", "swap"])
def test_preemption_while_graphs_replay(swap: float, ahead: bool, device: str) -> None:
    """Too few pages for all: sequences leave and come back between replays.

    Each grows over the edge of a page, whatever the kernel's tile.
    """
    requests = cases(8, tokens=TOKENS_PER_PAGE - 20, new=80)
    with engine(
        device,
        async_scheduling=ahead,
        swap_space=swap,
        kv_cache_memory_bytes=10 * PAGE,
        max_num_batched_tokens=256,
    ) as llm:
        assert_close_to_model(generate(llm, requests), requests, device)
        assert llm.stats().num_preemptions > 0
        assert (llm.stats().requests_swapped_in > 0) == (swap > 0)
        assert_graphed(llm, device)


def test_samples_that_share_their_prompt(device: str) -> None:
    """Forks: replays write beside pages that other sequences read."""
    requests = cases(4, tokens=TOKENS_PER_PAGE + 20)
    prompts: Any = [{"prompt_token_ids": list(case.prompt)} for case in requests]
    params = vattn.SamplingParams(n=4, temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
    with engine(device) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            texts = [tuple(sample.token_ids) for sample in output.outputs]
            assert [len(text) for text in texts] == [20] * 4
            assert len(set(texts)) > 1
        assert llm.stats().requests_forked > 0
        assert_graphed(llm, device)


def test_graphs_around_a_compiled_model(device: str) -> None:
    requests = cases(4, new=12)
    sizes = {"cudagraph_capture_sizes": [1, 4]}
    with engine(device, compile_model=True, max_num_seqs=4, **sizes) as llm:
        assert llm.stats().graphs_captured == (2 if device == "cuda" else 0)
        assert_close_to_model(generate(llm, requests), requests, device)
        assert_graphed(llm, device)


def test_memory_of_a_running_engine_is_taken_away_and_given_back(device: str) -> None:
    """The pool's budget moves between two steps; sequences are preempted, and none is lost."""
    requests = cases(8, tokens=TOKENS_PER_PAGE - 20, new=80)
    with engine(device) as llm:
        pool = llm.engine.cache.pool
        for i, case in enumerate(requests):
            params = greedy(case.new_tokens)
            for request in llm.engine.make_requests(f"r{i}", list(case.prompt), params):
                llm.engine.add(request)
        for step in range(1000):
            if not llm.engine.has_unfinished:
                break
            llm.engine.step()
            llm.engine.check()
            if step == 15:
                pool.set_budget(8 * PAGE)
            elif step == 60:
                pool.set_budget("512MiB")
        assert not llm.engine.has_unfinished
        assert llm.stats().num_preemptions > 0
        assert llm.stats().generation_tokens == sum(case.new_tokens for case in requests)
        assert_graphed(llm, device)


@pytest.mark.parametrize("backend", [name for name, kind in BACKENDS.items() if kind.graphs])
def test_steady_steps_never_wait_for_the_device(backend: str, device: str) -> None:
    """Torch raises where its code would wait; the step that does fails its requests."""
    if device != "cuda":
        pytest.skip("only a GPU is waited for")
    requests = cases(8, new=60)
    sampled = vattn.SamplingParams(temperature=0.8, top_p=0.9, max_tokens=60, ignore_eos=True)
    with engine(device, attention_backend=backend, async_scheduling=True) as llm:
        added = []
        for i, case in enumerate(requests):
            params = greedy(case.new_tokens, logprobs=1) if i % 2 else sampled
            added += llm.engine.make_requests(f"r{i}", list(case.prompt), params)
        for request in added:
            llm.engine.add(request)
        for _ in range(200):  # a request that failed gets no tokens
            if min(len(request.output_ids) for request in added) >= 3:
                break
            llm.engine.step()
        assert [request.error for request in added] == [None] * len(added)
        assert min(len(request.output_ids) for request in added) >= 3
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while llm.engine.has_unfinished:
            llm.engine.step()
        assert [request.error for request in added] == [None] * len(added)
        assert [len(request.output_ids) for request in added] == [60] * len(added)
