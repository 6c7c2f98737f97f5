"""Scored prompts in the scheduler: a step's share of scores, who waits for it, who takes over."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.engine import score_room
from vattn.engine.scheduler import Plan
from vattn.engine.score_room import score_share
from vattn.outputs import Logprob
from vattn.request import FinishReason, Request
from vattn.sampling_params import SamplingParams


@pytest.fixture(autouse=True, params=[0, 1], ids=["", "ahead"])
def steps_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(FakeEngine, "steps_in_flight", request.param)
    monkeypatch.setattr(score_room, "MAX_SCORED_TOKENS", 8)
    return int(request.param)


def scored(name: str, prompt: int, new: int = 4, *, count: int = 1, **options: Any) -> Request:
    params = SamplingParams(max_tokens=new, prompt_logprobs=count)
    return make_request(name, prompt, new, params=params, prompt_logprobs=[None], **options)


def know(request: Request, tokens: int) -> None:
    """The scores of its first tokens are known."""
    request.prompt_logprobs = [None]
    request.prompt_logprobs += [{t: Logprob(-1.0, 1)} for t in request.prompt_ids[1:tokens]]


def chunks(plan: Plan) -> list[tuple[str, int]]:
    return [(request.id, n) for request, n in plan.chunks]


def assert_scored(known: Any, request: Request) -> None:
    assert known is not None
    assert known[0] is None
    assert [list(entry) for entry in known[1:]] == [[token] for token in request.prompt_ids[1:]]


def test_nobody_waits_with_a_prompt_that_waits_for_scores() -> None:
    engine = FakeEngine(max_num_batched_tokens=32, max_num_seqs=4)
    first, second = scored("first", 20), scored("second", 20)
    engine.add(first, second, make_request("plain", 6), make_request("other", 7))
    assert chunks(engine.step()) == [("first", 8), ("plain", 6), ("other", 7)]
    assert chunks(engine.step()) == [("first", 8)]
    assert chunks(engine.step()) == [("first", 4), ("second", 5)]  # first's last token has no score
    engine.add(make_request("late", 5))
    plan = engine.step()
    assert ("second", 8) in chunks(plan)
    engine.run()
    for each in (first, second):
        assert_scored(each.prompt_logprobs, each)
    engine.assert_empty()


def test_whole_prompts_wait_for_scores_alone() -> None:
    engine = FakeEngine(
        max_num_batched_tokens=64, max_num_seqs=4, max_model_len=64, enable_chunked_prefill=False
    )
    first, second = scored("first", 9), scored("second", 6)
    engine.add(first, second, make_request("plain", 6))
    assert chunks(engine.step()) == [("first", 9), ("plain", 6)]
    assert chunks(engine.step()) == [("second", 6)]
    engine.run()
    for each in (first, second):
        assert_scored(each.prompt_logprobs, each)
    engine.assert_empty()


def test_what_has_its_scores_is_computed_again_without_limit() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, max_num_seqs=4)
    again, other = scored("again", 40), scored("other", 9)
    know(again, 40)
    engine.add(again, other)
    plan = engine.step()
    assert chunks(plan) == [("again", 40), ("other", 9)]
    assert [request.id for request, _, _ in plan.scored] == ["other"]
    engine.run()
    engine.assert_empty()


def test_some_scores_are_known_after_a_preemption() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, max_num_seqs=4)
    again = scored("again", 40)
    know(again, 11)
    engine.add(again)
    plan = engine.step()
    assert chunks(plan) == [("again", 18)]
    assert plan.scored == [(again, 10, 8)]
    engine.run()
    assert_scored(again.prompt_logprobs, again)
    engine.assert_empty()


def test_wide_rows_take_more_of_the_share() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, max_num_seqs=4, vocab_size=4096)
    wide, narrow = scored("wide", 9, count=-1), scored("narrow", 9, count=1024)
    engine.add(wide, narrow)
    assert chunks(engine.step()) == [("wide", 2)]
    seen = [chunks(engine.step()) for _ in range(5)]
    assert seen[:3] == [[("wide", 2)]] * 2 + [[("wide", 3)]]
    assert seen[3] == [("narrow", 9)]
    engine.run()
    for each in (wide, narrow):
        assert_scored(each.prompt_logprobs, each)
    engine.assert_empty()


def test_the_share_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_room, "MAX_SCORED_TOKENS", 1024)
    for count, vocab_size, share in [
        (0, 10**9, 1),
        (1024, 10**9, 1),
        (-1, 1, 1),
        (-1, 1024, 1),
        (-1, 1025, 2),
        (-1, 128 * 1024, 128),
        (-1, 10**9, 1024),  # one token can always be scored
    ]:
        assert score_share(SamplingParams(prompt_logprobs=count), vocab_size) == share


# Who takes over -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_another_sample_finds_the_scores_that_the_first_did_not(steps: int) -> None:
    engine = FakeEngine(max_num_batched_tokens=32, max_num_seqs=4)
    source = scored("r.0", 20, 6)
    samples = [source] + [make_request(f"r.{i}", 20, 6, source=source) for i in (1, 2, 3)]
    engine.add(*samples)
    for _ in range(steps):
        engine.step()
    engine.scheduler.abort("r.0")
    engine.step()
    engine.scheduler.abort("r.1")
    engine.run()
    assert_scored(source.prompt_logprobs, source)
    assert [s.finish_reason for s in samples[2:]] == [FinishReason.LENGTH] * 2
    assert [s.tokens for s in samples[2:]] == [expected_tokens(s) for s in samples[2:]]
    engine.assert_empty()


def test_a_sample_that_comes_after_the_end_of_the_first_finds_the_scores() -> None:
    engine = FakeEngine(max_num_batched_tokens=32)
    source = scored("r.0", 20)
    engine.add(source)
    engine.step()
    engine.scheduler.abort(source)
    engine.add(make_request("r.1", 20, source=source))
    engine.run()
    assert_scored(source.prompt_logprobs, source)
    engine.assert_empty()


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_ends_with_all_scores(seed: int) -> None:
    rng = random.Random(seed)
    vocab_size = rng.choice([1, 3000])
    memory = FakeMemory(budget=rng.choice([30, 1000]), swap_pages=rng.choice([0, 20]))
    engine = FakeEngine(
        memory,
        max_num_batched_tokens=rng.choice([6, 16, 64]),
        max_num_seqs=rng.randint(1, 6),
        policy=rng.choice(["fcfs", "priority"]),
        vocab_size=vocab_size,
    )
    prompts: list[list[Request]] = []
    for number in range(12):
        length, new, rank = rng.randint(1, 40), rng.randint(1, 8), rng.choice([0, 1])
        if rng.random() < 0.4:
            source = make_request(f"{number}.0", length, new, priority=rank)
        else:
            count = rng.choice([0, -1])
            source = scored(f"{number}.0", length, new, count=count, priority=rank)
        source.order = number
        more = [
            make_request(f"{number}.{i}", length, new, source=source, priority=rank)
            for i in range(1, rng.randint(1, 4))
        ]
        prompts.append([source, *more])
    waiting, gone = [each for prompt in prompts for each in prompt], set()
    while waiting or engine.scheduler.has_unfinished or engine.flying is not None:
        for _ in range(rng.randint(0, 5)):
            if waiting:
                engine.add(waiting.pop(0))
        if rng.random() < 0.2:
            one = rng.choice(rng.choice(prompts))
            if engine.scheduler.abort(one):
                gone.add(one)
        plan = engine.step()
        assert sum(score_share(r.params, vocab_size) * n for r, _, n in plan.scored) <= 8
        assert engine.steps < 3000
    for source, *more in prompts:
        if source.prompt_logprobs is not None and {source, *more} - gone:
            assert_scored(source.prompt_logprobs, source)
        for each in {source, *more} - gone:
            assert each.tokens == expected_tokens(each)
    engine.assert_empty()
