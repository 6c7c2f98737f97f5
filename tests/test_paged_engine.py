"""The paged baseline in an engine: what `generate` says, whatever the memory does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vattn
from bench.paged import storage
from bench.paged.cache import PagedCache
from bench.paged.select import BEST_BLOCK
from bench.paged.storage import paged_storage
from tests import beam_cases
from tests.beam_cases import beam_llm, search
from tests.engine_cases import (
    ALL_FAMILIES,
    Case,
    assert_equal,
    fresh_model,
    greedy,
    make_llm,
    mixed_cases,
    reference,
    run,
)
from tests.models import one_thread
from tests.paged_engines import NGRAM, UNSET, finish, memory_of, paged
from tests.paged_model import tensors

TIGHT = "300KiB"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_mixed_requests(family: str, is_async: bool) -> None:
    cases = mixed_cases(family)
    llm = paged(family, async_scheduling=is_async, max_num_batched_tokens=96)
    assert_equal(run(llm, cases), cases, family)
    finish(llm)


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_preemption_by_recompute(is_async: bool, prefixes: bool) -> None:
    cases = mixed_cases("llama")
    llm = paged(
        kv_cache_memory_bytes=TIGHT,
        max_num_seqs=16,
        enable_prefix_caching=prefixes,
        async_scheduling=is_async,
    )
    assert_equal(run(llm, cases), cases, "llama")
    stats = llm.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_hits > 0) == prefixes
    finish(llm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefix_hits_are_whole_blocks(family: str) -> None:
    """With layers of windows too: what lies behind a window is kept."""
    cases = mixed_cases(family)
    llm = paged(family)
    assert_equal(run(llm, cases), cases, family)
    again = run(llm, cases)
    assert_equal(again, cases, family)
    for output, case in zip(again, cases, strict=True):
        assert output.num_cached_tokens == (len(case.prompt) - 1) // 8 * 8
    llm.reset_prefix_cache()
    once_more = run(llm, cases[:1])
    assert once_more[0].num_cached_tokens == 0
    finish(llm)


@pytest.mark.parametrize("prefixes", [False, True])
def test_samples_of_one_prompt(prefixes: bool) -> None:
    cases = [case for case in mixed_cases("llama") if len(case.prompt) == 33][:4]
    llm = paged(max_num_seqs=12, enable_prefix_caching=prefixes)
    outputs = run(llm, cases, n=3)
    assert_equal(outputs, cases, "llama")
    # 32 of 33 tokens: four blocks, and none to copy.
    assert llm.stats().cache.copied_bytes == 0
    assert all(s.kv is not None for output in outputs for s in output.outputs)
    assert {s.kv.shared_pages for output in outputs for s in output.outputs if s.kv} == {4}
    cases = [case for case in mixed_cases("llama") if len(case.prompt) == 40][:2]
    outputs = run(llm, cases, n=3)
    assert_equal(outputs, cases, "llama")
    # 39 of 40: four, and seven tokens of a fifth that each of the others copies.
    block = llm.engine.cache.stats().page_bytes
    assert llm.stats().cache.copied_bytes == 2 * 2 * block
    copied = [sorted(s.kv.copied_bytes for s in o.outputs if s.kv) for o in outputs]
    assert copied == [[0, block, block]] * 2
    finish(llm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ngram_speculation(family: str) -> None:
    cases = mixed_cases(family)
    llm = paged(family, speculative_config=NGRAM)
    assert_equal(run(llm, cases), cases, family)
    stats = llm.stats()
    assert stats.spec_decode_num_accepted_tokens > 0
    assert stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    finish(llm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"enable_prefix_caching": False},
        {"kv_cache_memory_bytes": "420KiB"},
        {"speculative_config": NGRAM},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beam_search(family: str, options: dict[str, Any]) -> None:
    llm = beam_llm(family, storage=paged_storage(8), **{**UNSET, **options})
    beam_cases.assert_equal(beam_cases.run(llm, search()), family, search())
    assert llm.stats().beams_moved > 0
    if "kv_cache_memory_bytes" in options:
        assert llm.stats().num_preemptions > 0
    finish(llm)


def test_a_lowered_budget_preempts_and_a_raised_one_is_used_again() -> None:
    cases = [case for case in mixed_cases("llama") if len(case.prompt) >= 33][:16]
    llm = paged(max_num_seqs=16)
    engine, memory = llm.engine, memory_of(llm)
    prompts = [list(case.prompt) for case in cases]
    requests = []
    for i, (prompt, case) in enumerate(zip(prompts, cases, strict=True)):
        requests += engine.make_requests(str(i), prompt, greedy(case.new_tokens))
        engine.add(requests[-1])
    with one_thread():
        for _ in range(3):
            engine.step()
        size = memory.cache.block_bytes
        live = memory.cache.blocks.live
        memory.set_budget((live // 2 + 1) * size)
        assert memory.over_budget()
        engine.step()
        assert memory.cache.blocks.live <= live // 2
        assert engine.stats().num_preemptions > 0
        memory.set_budget(memory.cache.num_blocks * size)
        while engine.has_unfinished:
            engine.step()
            engine.check()
    wanted = reference("llama")
    assert [r.output_ids for r in requests] == [wanted[case] for case in cases]
    finish(llm)


def test_a_failed_step_fails_its_requests_and_no_others() -> None:
    cases = [case for case in mixed_cases("llama") if len(case.prompt) == 40]
    llm = paged(async_scheduling=True)
    engine: Any = llm.engine
    launch, calls = engine.runner.run, 0

    def fails(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        out = launch(batch)
        if calls == 3:
            for tensor in tensors(engine.cache):  # whatever it wrote is no number
                tensor[engine.cache.blocks.held()] = float("nan")
            raise RuntimeError("a kernel")
        return out

    engine.runner.run = fails
    outputs = llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        [greedy(case.new_tokens) for case in cases],
        use_tqdm=False,
    )
    errors = [str(output.outputs[0].error) for output in outputs]
    assert all("a kernel" in error for error in errors), errors
    assert llm.stats().cache.kept_bytes == 0
    assert all(tensor.isfinite().all() for tensor in tensors(engine.cache))
    assert_equal(run(llm, cases), cases, "llama")
    finish(llm)


def test_an_interruption_loses_everything_cleanly() -> None:
    cases = [case for case in mixed_cases("llama") if len(case.prompt) == 40]
    llm = paged()
    engine: Any = llm.engine
    launch = engine.runner.run

    def interrupt(batch: Any) -> Any:
        launch(batch)
        raise KeyboardInterrupt

    engine.runner.run = interrupt
    (request,) = engine.make_requests("a", list(cases[0].prompt), greedy(4))
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.cache.blocks.held() == []
    engine.runner.run = launch
    assert_equal(run(llm, cases), cases, "llama")
    finish(llm)


# How it is made -----------------------------------------------------------------------------------


def test_the_block_is_the_kernels_best_unless_given() -> None:
    llm = paged(block_tokens=None)
    cache: Any = llm.engine.cache
    assert isinstance(cache, PagedCache)
    assert cache.block_tokens == BEST_BLOCK["sdpa-gather"]
    assert (cache.max_seqs, cache.max_tokens) == (64, 256)
    finish(llm)


@pytest.mark.parametrize(
    ("prefixes", "is_async", "slots", "rows"),
    [(False, False, 2, 2), (False, True, 4, 4), (True, False, 2, 2 + 64)],
)
def test_a_large_budget_is_not_allocated_beyond_what_can_be_used(
    prefixes: bool, is_async: bool, slots: int, rows: int
) -> None:
    llm = paged(
        max_num_seqs=2,
        max_model_len=60,
        kv_cache_memory_bytes="1GiB",
        enable_prefix_caching=prefixes,
        async_scheduling=is_async,
    )
    cache: Any = llm.engine.cache
    assert cache.max_seqs == slots
    assert cache.num_blocks == rows * 8 + 1
    llm.set_budget("1GiB")  # what it was made for; it needs no more than it has
    with pytest.raises(ValueError, match=r"more than the 1\.0 GiB that were allocated"):
        llm.set_budget("1100MiB")
    finish(llm)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("alloc: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_blocks_that_cannot_be_allocated(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(storage, "PagedCache", fail)
    with pytest.raises(ValueError, match=r"do not fit.*; lower kv_cache_memory_bytes"):
        paged(kv_cache_memory_bytes="4MiB")
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        paged(kv_cache_memory_bytes="4MiB")


def test_the_budget_counts_the_null_block() -> None:
    size = 8 * sum(spec.token_bytes for spec in paged().engine.cache.specs)
    llm = paged(kv_cache_memory_bytes=5 * size + 1)
    cache: Any = llm.engine.cache
    assert cache.num_blocks == 5
    assert cache.stats().reserved_bytes == cache.stats().budget_bytes == 5 * size
    output = llm.generate({"prompt_token_ids": list(range(2, 34))}, greedy(2), use_tqdm=False)[
        0
    ].outputs[0]
    assert output.error is not None
    assert "32 tokens need 5 blocks of 8 tokens" in output.error
    assert "the budget of the KV cache is 4 blocks" in output.error
    case = Case(tuple(range(2, 20)), 40)
    output = run(llm, [case])[0].outputs[0]
    assert output.error is not None
    assert "out of blocks" in output.error
    finish(llm)
    with pytest.raises(ValueError, match="no room for two blocks of 8 tokens"):
        paged(kv_cache_memory_bytes=size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_bytes", 4096),
        ("order", "head"),
        ("layers_per_region", 1),
        ("strict", True),
        ("attention_backend", "sdpa"),
        ("swap_space", 1),
    ],
)
def test_settings_of_the_contiguous_side_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} does not apply to a paged cache"):
        paged(**{name: value})


def test_an_eviction_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eviction_policy=.* does not apply to a paged cache"):
        paged(eviction_policy=vattn.EvictionPolicy())


def test_a_pool_a_draft_model_and_bad_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no use for the pool given"):
        paged(pool=vattn.PagePool("cpu", budget_bytes="1MiB"), kv_cache_memory_bytes=None)
    draft = {"model": fresh_model("llama"), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="takes its pages from the engine's pool"):
        paged(speculative_config=draft)
    with pytest.raises(ValueError, match="block_tokens=0 must be a positive integer"):
        paged_storage(0)
    with pytest.raises(ValueError, match="kernel='nothing' is not one of"):
        make_llm(storage=paged_storage(kernel="nothing"), **UNSET)
