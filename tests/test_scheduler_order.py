"""Who is served first: priorities, ranks, samples of one prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.scheduler_cases import (
    chunks,
    ids,
    pytest_generate_tests,
    step_by_step,
    steps_in_flight,
)
from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.request import FinishReason, Request

__all__ = ["pytest_generate_tests", "steps_in_flight"]  # pytest finds them by their names


# Priorities ---------------------------------------------------------------------------------------


def test_priorities_decide_the_order() -> None:
    engine = FakeEngine(max_num_seqs=1, policy="priority", stage_ahead=False)
    for name, priority in (("low", 5), ("mid1", 3), ("high", 0), ("mid2", 3)):
        engine.add(make_request(name, priority=priority))
    assert ids(engine.run()) == ["high", "mid1", "mid2", "low"]


def test_first_come_first_served_ignores_priorities() -> None:
    engine = FakeEngine(max_num_seqs=2)
    engine.add(*(make_request(name, priority=-i) for i, name in enumerate("abcdef")))
    assert ids(engine.run()) == list("abcdef")
    assert engine.scheduler.stats().preemptions == 0


def test_the_more_urgent_takes_the_place_of_the_less() -> None:
    engine = FakeEngine(max_num_seqs=2, policy="priority")
    a, b = make_request("a", 4, 20, priority=1), make_request("b", 4, 20, priority=2)
    engine.add(a, b)
    engine.step()
    engine.add(make_request("equal", 4, 20, priority=2), make_request("urgent", 4, 3, priority=0))
    plan = engine.step()
    assert {*ids(plan.requests)} == {"a", "urgent"}
    assert b.preemptions == 1
    assert ids(engine.run()) == ["urgent", "a", "b", "equal"]
    assert engine.scheduler.stats().preemptions == 1
    assert b.tokens == expected_tokens(b)
    engine.assert_empty()


def test_several_urgent_ones_are_admitted_in_one_step() -> None:
    engine = FakeEngine(max_num_seqs=3, policy="priority")
    engine.add(*(make_request(name, 2, 20, priority=5) for name in "abc"))
    engine.step()
    engine.add(*(make_request(name, 2, 3, priority=1) for name in "xyz"))
    assert {*ids(engine.step().requests)} == {*"xyz"}
    engine.run()
    assert engine.scheduler.stats().preemptions == 3
    engine.assert_empty()


def test_the_more_urgent_takes_pages_too() -> None:
    engine = FakeEngine(FakeMemory(budget=8), max_num_seqs=4, policy="priority")
    engine.add(*(make_request(name, 12, 4, priority=5) for name in "ab"))
    engine.step()
    engine.step()
    engine.add(make_request("urgent", 12, 4, priority=1))
    plan = engine.step()
    assert "urgent" in ids(plan.requests)
    assert "b" not in ids(plan.requests)
    assert ids(engine.run()) == ["urgent", "a", "b"] or ids(engine.ended) == ["a", "urgent", "b"]
    engine.assert_empty()


def shortest(request: Request) -> int:
    return len(request.prompt_ids)


def test_a_function_decides_the_order_once_for_each() -> None:
    asked: list[str] = []

    def rank(request: Request) -> tuple[float, int]:
        asked.append(request.id)
        return (-float("inf"), 0) if request.priority else (0.5, len(request.prompt_ids))

    engine = FakeEngine(max_num_seqs=1, policy=rank, stage_ahead=False)
    for name, length, priority in (("c", 9, 0), ("b", 4, 0), ("also b", 4, 0), ("a", 12, 1)):
        engine.add(make_request(name, length, priority=priority))
    assert ids(engine.run()) == ["a", "b", "also b", "c"]
    assert asked == ["c", "b", "also b", "a"]
    engine.assert_empty()


@pytest.mark.parametrize("fails", [False, True])
def test_the_samples_of_a_prompt_have_one_rank_or_are_refused_together(fails: bool) -> None:
    asked: list[str] = []

    def rank(request: Request) -> int:
        asked.append(request.id)
        return 1 // (0 if fails and len(asked) == 1 else 1) - len(asked)

    engine = FakeEngine(policy=rank)
    samples = [make_request("s0", 4)]
    samples += [make_request(f"s{i}", 4, source=samples[0]) for i in (1, 2)]
    for sample in samples:
        if not fails:
            engine.add(sample)
            continue
        with pytest.raises(ValueError, match="ZeroDivisionError") as told:
            engine.add(sample)
        engine.scheduler.refuse(sample, str(told.value))
    assert asked == ["s0"]
    assert {r.rank for r in samples} == {None if fails else (0,)}
    engine.run()
    engine.assert_empty()


def test_by_a_function_the_first_takes_the_place_of_the_last() -> None:
    engine = FakeEngine(max_num_seqs=2, policy=shortest)
    a, b = make_request("a", 4, 20), make_request("b", 6, 20)
    engine.add(a, b)
    engine.step()
    engine.add(make_request("equal", 6, 20), make_request("short", 2, 3))
    plan = engine.step()
    assert {*ids(plan.requests)} == {"a", "short"}
    assert ids(engine.run()) == ["short", "a", "b", "equal"]
    assert engine.scheduler.stats().preemptions == 1
    assert b.tokens == expected_tokens(b)
    engine.assert_empty()


def broken(request: Request) -> float:
    return 1 / (len(request.prompt_ids) - 4)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (broken, "scheduling_policy=broken failed for this request: ZeroDivisionError"),
        (lambda request: None, r"<lambda> returned None for this request; a rank is a number, or"),
        (lambda request: "high", "returned 'high' for this request"),
        (lambda request: float("nan"), "returned nan"),
        (lambda request: (), r"returned \(\)"),
        (lambda request: (1, "b"), r"returned \(1, 'b'\)"),
        (lambda request: (1, float("nan")), r"returned \(1, nan\)"),
    ],
)
def test_who_has_no_rank_is_refused_alone(policy: Any, message: str) -> None:
    def of_some(request: Request) -> Any:
        return 1 if request.id == "other" else policy(request)

    of_some.__qualname__ = policy.__qualname__
    engine = FakeEngine(policy=of_some)
    bad = make_request("bad", 4)
    engine.add(make_request("other", 6))
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.add(bad)
    assert ids(engine.run()) == ["other"]
    engine.assert_empty()


def test_ranks_of_every_size_compare() -> None:
    ranks = {"c": 10**400, "b": 1.5, "a": (1, 5), "d": float("inf"), "first": np.float32(-1)}
    engine = FakeEngine(max_num_seqs=1, policy=lambda r: ranks[r.id], stage_ahead=False)
    engine.add(*(make_request(name) for name in ranks))
    assert ids(engine.run()) == ["first", "a", "b", "c", "d"]


def test_no_ping_pong_between_equals() -> None:
    engine = FakeEngine(FakeMemory(budget=5), max_num_seqs=4, policy="priority")
    engine.add(*(make_request(name, 8, 8, priority=1) for name in "abcd"))
    assert ids(engine.run(most_steps=4 * 10)) == list("abcd")


# Samples of one prompt ----------------------------------------------------------------------------


def siblings(n: int, prompt: int = 10, new: int = 3) -> list[Request]:
    first = make_request("s0", prompt, new, seed=1)
    rest = [
        make_request(f"s{i}", prompt, new, seed=i + 1, index=i, source=first) for i in range(1, n)
    ]
    return [first, *rest]


def test_samples_wait_for_the_prompt_and_share_it() -> None:
    engine = FakeEngine(FakeMemory(budget=100, prefixes=False), max_num_batched_tokens=8)
    requests = siblings(4)
    engine.add(*requests, make_request("other", 2, 2))
    assert chunks(engine.step()) == [("s0", 8)]
    assert chunks(engine.step()) == [("s0", 2), ("other", 2)]
    plan = engine.step()
    assert ids(plan.decodes) == ["s0", "other", "s1", "s2"]  # their last prompt token
    assert engine.memory.forks == 3  # the third is staged for the place of "other"
    engine.run()
    assert [r.tokens for r in requests] == [expected_tokens(r) for r in requests]
    assert len({tuple(r.tokens) for r in requests}) > 1
    assert engine.scheduler.stats().scheduled_tokens == 10 + 3 + 2 + 1 + 4 * 2
    engine.assert_empty()


@pytest.mark.parametrize("reason", ["abort", "never fits", "deadline"])
def test_samples_go_on_without_their_source(reason: str) -> None:
    engine = FakeEngine(FakeMemory(budget=3), max_num_batched_tokens=8)
    requests = siblings(3, prompt=10, new=2)
    if reason == "never fits":
        requests[0] = make_request("s0", 20, 2)
        for sibling in requests[1:]:
            sibling.source = requests[0]
    if reason == "deadline":
        requests[0].deadline_s = 0.5
    engine.add(*requests)
    engine.step()
    if reason == "abort":
        engine.scheduler.abort("s0")
    engine.now = 1.0
    engine.run()
    assert {r.finish_reason for r in requests[1:]} == {FinishReason.LENGTH}
    assert [r.source for r in requests] == [None] * 3
    assert [r.tokens for r in requests[1:]] == [expected_tokens(r) for r in requests[1:]]
    engine.assert_empty()


@step_by_step
def test_a_held_sample_is_aborted_and_its_source_preempted() -> None:
    engine = FakeEngine(FakeMemory(budget=100, prefixes=False), max_num_batched_tokens=8)
    requests = siblings(3, prompt=20)
    engine.add(make_request("old", 2, 9), *requests)
    engine.step()
    engine.scheduler.abort("s1")
    engine.memory.fail_grows = 1
    engine.step()
    assert requests[0].preemptions == 1
    engine.run()
    assert requests[1].finish_reason is FinishReason.ABORT
    assert requests[2].tokens == expected_tokens(requests[2])
    engine.assert_empty()


def test_a_sample_of_a_finished_source_goes_alone() -> None:
    engine = FakeEngine()
    requests = siblings(2)
    engine.add(requests[0])
    engine.run()
    engine.add(requests[1])
    engine.run()
    assert requests[1].tokens == expected_tokens(requests[1])
    engine.assert_empty()
