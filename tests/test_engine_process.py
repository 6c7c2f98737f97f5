"""The engine process, driven through its sockets, against an LLM in this process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import vattn
from tests.engine_cases import EMBEDDED_PATH
from tests.engine_owner import SETTINGS, Owner, child, owner
from vattn.engine_process.messages import (
    RECYCLED,
    Abort,
    Add,
    BudgetReport,
    PageRows,
    Ready,
    Stats,
    Stop,
    Trouble,
)
from vattn.kv.report import PageState
from vattn.sampling_params import SamplingParams, StructuredOutputsParams

PROMPTS = [[5 + i, 300 + 7 * i, 17, 900 - i, *range(40, 40 + 6 * i)] for i in range(4)]
FOREVER = SamplingParams(max_tokens=480, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[Owner, int]]:
    with owner() as made, child(made) as running:
        ready = made.start()
        assert isinstance(ready, Ready), ready
        yield made, running.pid
        made.send(Stop())
        assert running.wait(60) == 0


@pytest.fixture
def engine(process: tuple[Owner, int]) -> Iterator[Owner]:
    """The owner of a shared process. In the end it is sound, and nothing runs."""
    yield process[0]
    found = process[0].ask("check")
    assert isinstance(found, dict), found
    assert (found["open_slots"], found["live_bytes"], found["unfinished"]) == (0, 0, 0)


@pytest.fixture(scope="module")
def llm() -> Iterator[vattn.LLM]:
    with vattn.LLM(EMBEDDED_PATH, page_bytes=4096, max_model_len=512, **SETTINGS) as made:
        yield made


def ids(llm: vattn.LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def test_greedy_tokens_are_those_of_an_llm(engine: Owner, llm: vattn.LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    handles = [engine.add(prompt, params) for prompt in PROMPTS]
    got = [[sample.tokens for sample in engine.outcome(handle)] for handle in handles]
    assert got == ids(llm, PROMPTS, params)
    end = engine.samples[handles[0], 0].end
    assert end is not None
    assert end.finish_reason == "length"
    assert 0 < end.timings.arrival_s <= end.timings.first_token_s <= end.timings.finished_s
    assert end.kv is not None
    assert end.kv.pages > 0


def test_samples_of_a_prompt(engine: Owner, llm: vattn.LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=12, temperature=1.0)
    got = [sample.tokens for sample in engine.outcome(engine.add(PROMPTS[1], params), 2)]
    assert got == ids(llm, [PROMPTS[1]], params)[0]
    assert got[0] != got[1]


def test_log_probabilities(engine: Owner, llm: vattn.LLM) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, prompt_logprobs=1)
    prompt = [1023, 77, 512, 9]
    (sample,) = engine.outcome(engine.add(prompt, params))
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    expected = output.outputs[0].logprobs
    assert expected is not None
    assert [list(each) for each in sample.logprobs] == [list(each) for each in expected]
    for ours, theirs in zip(sample.logprobs, expected, strict=True):
        for token, (logprob, rank) in ours.items():
            assert logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
            assert rank == theirs[token].rank
    assert sample.prompt_logprobs[0] is None
    assert len(sample.prompt_logprobs) == len(prompt)


def test_what_cannot_be_served_is_refused(engine: Owner) -> None:
    bad = {
        engine.add([5, 99_999], SamplingParams()): "token id 99999",
        engine.add([], SamplingParams()): "prompt is empty",
        engine.add([5], SamplingParams(logprobs=500)): "max_logprobs",
        engine.add([5], SamplingParams(), priority=3): "priority",
        engine.add([5], structured("[")): "structured_outputs",
    }
    engine.send(Add(10_001, "x", [5], {"temperature": -1.0}))
    engine.send(Add(10_002, "x", [5], {"no_such": 1}))
    bad |= {10_001: "temperature", 10_002: "no_such"}
    engine.until(lambda: bad.keys() <= engine.refused.keys())
    for handle, words in bad.items():
        assert words in engine.refused[handle]


def structured(regex: str, **more: Any) -> SamplingParams:
    return SamplingParams(
        structured_outputs=StructuredOutputsParams(regex=regex), temperature=0.0, **more
    )


def test_structured_outputs(engine: Owner, llm: vattn.LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    given = StructuredOutputsParams(
        json={**schema, "additionalProperties": False}, disable_any_whitespace=True
    )
    params = SamplingParams(structured_outputs=given, max_tokens=40, temperature=0.0)
    (sample,) = engine.outcome(engine.add(PROMPTS[0], params))
    text = llm.get_tokenizer().decode(sample.tokens, skip_special_tokens=True)
    assert json.loads(text)["a"] in (True, False)


def test_an_abort_ends_what_runs_and_leaves_the_rest(engine: Owner) -> None:
    handle, other = engine.add(PROMPTS[2], FOREVER), engine.add(PROMPTS[3], FOREVER)
    engine.until(lambda: engine.samples[handle, 0].tokens and engine.samples[other, 0].tokens)
    engine.send(Abort([handle, 424_242]))  # which nobody knows
    (sample,) = engine.outcome(handle)
    assert sample.end is not None
    assert sample.end.finish_reason == "abort"
    assert 0 < len(sample.tokens) < 480
    assert engine.samples[other, 0].end is None
    engine.send(Abort([other, handle]))
    engine.outcome(other)


def test_an_abort_of_what_is_still_compiled_is_told(engine: Owner) -> None:
    # The first one keeps the compiler busy, whether for long or not: the second is told its end.
    first = engine.add([5], structured("(a|b){200,500}c", n=2, max_tokens=400))
    second = engine.add([5], structured("(x|y){200,400}z", n=2, max_tokens=400))
    engine.send(Abort([second, first]))
    for handle in (first, second):
        assert [s.end.finish_reason for s in engine.outcome(handle, 2) if s.end] == ["abort"] * 2


def test_many_samples_are_aborted_together(engine: Owner) -> None:
    handle = engine.add(PROMPTS[2], SamplingParams(n=3, max_tokens=400, ignore_eos=True))
    engine.until(lambda: engine.samples[handle, 2].tokens)
    engine.send(Abort([handle]))
    assert [s.end.finish_reason for s in engine.outcome(handle, 3) if s.end] == ["abort"] * 3


def test_a_deadline(engine: Owner) -> None:
    (sample,) = engine.outcome(engine.add(PROMPTS[0], FOREVER, deadline_s=time.monotonic() + 0.05))
    assert sample.end is not None
    assert sample.end.finish_reason == "deadline"


def test_the_budget_moves_and_memory_is_returned(engine: Owner, llm: vattn.LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    for handle in [engine.add(prompt, params) for prompt in PROMPTS]:
        engine.outcome(handle)
    before = msgspec.convert(engine.ask("stats"), Stats).pool
    low = before["created_bytes"] // 2 // 4096 * 4096
    report = msgspec.convert(engine.ask("set_budget", low), BudgetReport)
    assert report.budget_before == before["budget_bytes"]
    assert (report.budget, report.created_before) == (low, before["created_bytes"])
    assert report.created <= low
    assert report.returned == report.created_before - report.created > 0
    assert msgspec.convert(engine.ask("stats"), Stats).pool["created_bytes"] <= low
    handles = [engine.add(prompt, params) for prompt in PROMPTS]
    got = [[sample.tokens for sample in engine.outcome(handle)] for handle in handles]
    assert got == ids(llm, PROMPTS, params)  # some gave way
    report = msgspec.convert(engine.ask("set_budget", "64MiB"), BudgetReport)
    assert (report.budget_before, report.budget, report.returned) == (low, 64 << 20, 0)


def test_questions_that_have_no_answer(engine: Owner) -> None:
    for what, argument, words in (
        ("set_budget", "much", "budget_bytes"),
        ("memory_map", 0, "max_cells=0"),
        ("what", None, "memory_map"),
    ):
        got = engine.ask(what, argument)
        assert isinstance(got, Trouble)
        assert got.is_input
        assert words in got.error


def test_the_memory_map_tells_whose_pages_these_are(engine: Owner) -> None:
    assert engine.ask("reset_prefix_cache") is None
    handle = engine.add(PROMPTS[2], SamplingParams(n=2, max_tokens=400, ignore_eos=True, seed=1))
    engine.until(lambda: len(engine.samples[handle, 1].tokens) > 20)
    rows = msgspec.convert(engine.ask("memory_map", 8), PageRows)
    assert rows.slot_tokens == 512
    assert rows.pages_per_cell * 8 * rows.page_bytes >= 512 * 128
    ours = {row.index: row for row in rows.rows if row.handle == handle}
    assert ours.keys() == {0, 1}
    for row in ours.values():
        assert len(row.pages) <= 8
        assert row.tokens > 20
        assert row.pages[0] & ~RECYCLED in (PageState.LIVE, PageState.SHARED)
    assert all(any(row.pages) for row in rows.rows)
    engine.send(Abort([handle]))
    engine.outcome(handle, 2)


def test_figures_come_while_it_works_and_while_it_idles(engine: Owner) -> None:
    seen = len(engine.stats)
    handle = engine.add(PROMPTS[2], FOREVER)
    engine.until(lambda: engine.stats[seen:] and engine.stats[-1].requests)
    (request,) = engine.stats[-1].requests
    assert request[:2] == (handle, 0)
    assert engine.stats[-1].engine.num_running == 1
    engine.send(Abort([handle]))
    engine.outcome(handle)
    seen = len(engine.stats)
    engine.until(lambda: len(engine.stats) >= seen + 3)
    first, *_, last = engine.stats[seen:]
    assert last.requests == []
    assert last.engine.num_steps == first.engine.num_steps  # nobody asked for anything
    assert last.monotonic_s - first.monotonic_s > 0.9
    calls, seconds = last.driver_calls["map"]
    assert calls > 0
    assert 0 < seconds < 10


def test_signals_for_the_whole_group_do_not_end_it(process: tuple[Owner, int]) -> None:
    made, pid = process
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, signum)
    (sample,) = made.outcome(made.add(PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True)))
    assert len(sample.tokens) == 4


def test_it_ends_with_its_owner_and_removes_the_directory() -> None:
    with owner() as made, child(made) as running:
        assert running.stdin is not None
        running.stdin.close()  # whatever it is doing: importing torch, here
        assert running.wait(60) == 3
        assert not made.directory.exists()
