"""Asynchronous scheduling: the next step is launched before the tokens of the last are known."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import vattn
from tests.engine_cases import (
    ALL_FAMILIES,
    EMBEDDED_PATH,
    assert_equal,
    assert_nothing_left,
    greedy,
    make_llm,
    mixed_cases,
    run,
)
from tests.stub_model import VOCABULARY, StubModel, StubRunner, expected_tokens
from vattn.engine.batch import SAMPLED, StepBatch
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.engine.memory import MemoryManager
from vattn.request import FinishReason, Request
from vattn.sampling_params import RequestOutputKind, SamplingParams

PROMPTS = ["A transaction is a group of", "The", "Pages are mapped when", "In the year"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    """Chunked prompts, prefix hits, requests that are preempted and swapped, all a step ahead."""
    cases = mixed_cases(family)[:40]
    llm = make_llm(
        family,
        async_scheduling=True,
        kv_cache_memory_bytes="384KiB",
        order="token",
        swap_space=0.01,
        max_num_batched_tokens=64,
    )
    for _ in range(2):
        assert_equal(run(llm, cases), cases, family)
    stats = llm.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.generation_tokens == 2 * sum(case.new_tokens for case in cases)
    assert_nothing_left(llm)
    llm.close()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1.0, n=3, seed=4, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0, max_tokens=40, stop=["a", "the"], logprobs=1),
        SamplingParams(temperature=0, max_tokens=40, min_tokens=9, stop_token_ids=list(range(90))),
    ],
    ids=["top_p", "samples", "stop-strings", "min_tokens"],
)
def test_outputs_are_those_of_a_synchronous_engine(params: SamplingParams) -> None:
    found = []
    for ahead in (False, True):
        options: Any = {"page_bytes": 4096, "strict": True, "kv_cache_memory_bytes": "64MiB"}
        options |= {"dtype": "float32", "device": "cpu", "async_scheduling": ahead}
        with vattn.LLM(str(EMBEDDED_PATH), **options) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            found.append([sample for output in outputs for sample in output.outputs])
            assert_nothing_left(llm)
    for one, other in zip(*found, strict=True):
        for name in ("index", "text", "token_ids", "finish_reason", "stop_reason", "error"):
            assert getattr(one, name) == getattr(other, name)
        # The batches differ, and so do the last bits of what is computed in them.
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert {t: e.logprob for t, e in a.items()} == pytest.approx(
                {t: e.logprob for t, e in b.items()}, abs=1e-4
            )


def test_a_stream_gives_every_token_once() -> None:
    case = mixed_cases("llama")[5]
    llm = make_llm("llama", async_scheduling=True)
    whole: list[int] = []
    asked: Any = {"prompt_token_ids": list(case.prompt)}
    for output in llm.stream(asked, greedy(9, output_kind=RequestOutputKind.DELTA)):
        whole += output.outputs[0].token_ids
    (wanted,) = run(llm, [case])
    assert whole == wanted.outputs[0].token_ids[:9]
    assert_nothing_left(llm)
    llm.close()


# What is launched when ----------------------------------------------------------------------------


class WatchedRunner(StubRunner):
    """Remembers the batches, and raises in the step that is asked for."""

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.batches: list[StepBatch] = []
        self.fail_at = -1
        self.error: BaseException = RuntimeError("made to fail")

    def run(self, batch: StepBatch) -> Any:
        self.batches.append(batch)
        if len(self.batches) - 1 == self.fail_at:
            raise self.error
        return super().run(batch)


def make_engine(pages: int = 400, **options: Any) -> tuple[Engine, WatchedRunner]:
    pool = vattn.PagePool(
        "cpu",
        driver=vattn._core.host_driver(strict=True),
        page_bytes=4096,
        budget_bytes=pages * 4096,
    )
    config = EngineConfig(
        **{"max_num_seqs": 8, "order": "token", "async_scheduling": True, **options}
    )
    model: Any = StubModel(max_positions=512)
    engine = Engine(model, config, pool=pool)
    runner = WatchedRunner(engine.cache)
    engine.runner = runner  # type: ignore[assignment]
    return engine, runner


def prompt(n: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i + 7 * i) % VOCABULARY for i in range(n)]


def start(engine: Engine, ids: list[int], new: int, name: str = "r", **options: Any) -> Request:
    params = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **options
    )
    (request,) = engine.make_requests(name, ids, params)
    engine.add(request)
    return request


def drive(engine: Engine) -> None:
    for _ in range(1000):
        if not engine.has_unfinished:
            break
        engine.step()
        engine.check()
    assert not engine.has_unfinished


def finish(engine: Engine) -> None:
    engine.check()
    assert not engine.has_unfinished
    engine.memory.reset_prefix_cache()
    engine.cache.trim()
    engine.check()
    assert engine.cache.pool.stats().created_bytes == 0
    engine.close()


def test_decodes_take_their_input_from_the_device() -> None:
    engine, runner = make_engine()
    request = start(engine, prompt(20), 6)
    drive(engine)
    assert request.output_ids == expected_tokens(prompt(20), 6)
    assert len(runner.batches) == 6  # its length is known: no step in vain
    assert [batch.input_ids.tolist() for batch in runner.batches[1:]] == [[SAMPLED]] * 5
    finish(engine)


def test_a_stop_token_costs_one_step_in_vain_and_leaves_nothing() -> None:
    engine, runner = make_engine()
    wanted = expected_tokens(prompt(20), 5)
    request = start(engine, prompt(20), 60, stop_token_ids=[wanted[-1]])
    drive(engine)
    assert (request.output_ids, request.finish_reason) == (wanted, FinishReason.STOP)
    assert len(runner.batches) == 6
    # The sequence, its stop token included, is found again, and what follows it is right.
    again = start(engine, [*request.tokens, 1, 2, 3], 4, name="again")
    drive(engine)
    assert again.cached == len(request.tokens)
    assert again.output_ids == expected_tokens(again.prompt_ids, 4)
    finish(engine)


def test_an_aborted_request_gets_no_more_tokens() -> None:
    engine, _ = make_engine()
    stays, goes = start(engine, prompt(20), 12, "stays"), start(engine, prompt(9, 1), 12, "goes")
    for _ in range(4):
        engine.step()
    had = len(goes.output_ids)
    engine.abort("goes")
    told = engine.step()
    assert goes in told
    assert goes.finish_reason is FinishReason.ABORT
    assert len(goes.output_ids) == had
    drive(engine)
    assert len(goes.output_ids) == had
    assert stays.output_ids == expected_tokens(prompt(20), 12)
    finish(engine)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_failed_step_fails_its_requests_and_no_others(step: int) -> None:
    engine, runner = make_engine()
    runner.fail_at = step
    failed = start(engine, prompt(20), 12, "failed")
    for _ in range(step + 1):
        engine.step()
        engine.check()
    later = start(engine, prompt(20), 12, "later")
    drive(engine)
    assert failed.finish_reason is FinishReason.ERROR
    assert "made to fail" in str(failed.error)
    assert failed.output_ids == expected_tokens(prompt(20), 12)[: len(failed.output_ids)]
    assert later.output_ids == expected_tokens(prompt(20), 12)
    finish(engine)


def test_an_interruption_with_a_step_in_flight_loses_everything_cleanly() -> None:
    engine, runner = make_engine()
    runner.fail_at, runner.error = 3, KeyboardInterrupt()
    lost = start(engine, prompt(20), 12, "lost")
    with pytest.raises(KeyboardInterrupt):
        drive(engine)
    engine.check()
    again = start(engine, prompt(20), 12, "again")
    drive(engine)
    assert lost.finish_reason is FinishReason.ERROR
    assert again.cached == 0  # nothing is believed that was not computed
    assert again.output_ids == expected_tokens(prompt(20), 12)
    finish(engine)


@pytest.fixture
def with_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines set a slot apart, as they do for graphs."""
    build = MemoryManager.__init__

    def with_slot(self: Any, cache: Any, **options: Any) -> None:
        build(self, cache, **{**options, "scratch": True})

    monkeypatch.setattr(MemoryManager, "__init__", with_slot)


@pytest.mark.usefixtures("with_scratch")
def test_the_slot_of_padding_rows_survives_an_interruption() -> None:
    engine, runner = make_engine()
    memory = engine.memory
    assert memory.scratch_slot is not None
    address = engine.cache.view(memory.scratch_slot, 0)[0].data_ptr()
    runner.fail_at, runner.error = 2, KeyboardInterrupt()
    start(engine, prompt(20), 12, "lost")
    # Somebody else on the pool takes every page that becomes free.
    other = vattn.KVCache(
        2, 2, 8, torch.float32, max_seqs=1, max_tokens=40_000, pool=memory.cache.pool
    )
    cache: Any = engine.cache
    release = cache.trim

    def trim_and_take() -> None:
        release()
        with contextlib.suppress(vattn.OutOfPages):
            for tokens in range(100, 40_000, 100):
                other.ensure(thief, tokens)

    thief = other.open()
    cache.trim = trim_and_take
    with pytest.raises(KeyboardInterrupt):
        drive(engine)
    memory.check()
    assert engine.cache.tokens(memory.scratch_slot) == 1
    assert engine.cache.view(memory.scratch_slot, 0)[0].data_ptr() == address
    cache.trim = release
    other.close()
    again = start(engine, prompt(20), 12, "again")
    drive(engine)
    assert again.output_ids == expected_tokens(prompt(20), 12)
    engine.close()


@pytest.mark.usefixtures("with_scratch")
@pytest.mark.parametrize("pages", [7, 13])
def test_a_request_that_needs_the_padding_rows_pages_is_refused(pages: int) -> None:
    """For every length there is an answer: it fits, or the budget is too small, and no wait."""
    for tokens in range(60, 260, 9):
        engine, _ = make_engine(pages)
        request = start(engine, prompt(tokens), 4)
        drive(engine)
        assert request.finish_reason in (FinishReason.LENGTH, FinishReason.ERROR)
        if request.finish_reason is FinishReason.ERROR:
            assert "pages" in str(request.error)
        engine.close()


@pytest.mark.usefixtures("with_scratch")
def test_closing_with_a_step_in_flight_leaves_nothing() -> None:
    engine, _ = make_engine()
    request = start(engine, prompt(20), 12)
    for _ in range(3):
        engine.step()
    pool = engine.cache.pool
    engine.close()
    assert request.finish_reason is FinishReason.ABORT
    assert request.in_flight == 0
    assert engine._in_flight is None
    assert pool.stats().used_bytes == 0
    pool.check()
