"""The scheduler on a memory that counts pages: order, budgets, who gives way, who is told what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.engine.scheduler import Plan, Policy, Scheduler
from vattn.engine.waiting import RequestQueue
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams


def step_by_step(test: Any) -> Any:
    """A test that counts on each step's tokens having arrived before the next."""
    test.step_by_step = True
    return test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ahead = [0] if getattr(metafunc.function, "step_by_step", False) else [0, 1]
    metafunc.parametrize("steps_in_flight", ahead, indirect=True, ids=["", "ahead"][: len(ahead)])


@pytest.fixture(autouse=True)
def steps_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(FakeEngine, "steps_in_flight", request.param)
    return int(request.param)


def ids(requests: list[Request]) -> list[str]:
    return [request.id for request in requests]


def chunks(plan: Plan) -> list[tuple[str, int]]:
    return [(request.id, n) for request, n in plan.chunks]


# Settings and bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3 is less than max_num_seqs=4"),
        ({"max_model_len": -1}, "max_model_len=-1"),
        ({"policy": "sjf"}, "policy='sjf' must be one of fcfs, priority"),
        ({"enable_chunked_prefill": False}, "less than max_model_len=64"),
    ],
)
def test_bad_settings(changed: dict[str, object], message: str) -> None:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | changed
    with pytest.raises(ValueError, match=message):
        Scheduler(FakeMemory(budget=1), **settings)  # type: ignore[arg-type]


def test_bad_requests_change_nothing() -> None:
    engine = FakeEngine()
    engine.add(make_request("a"))
    for bad, message in [
        (make_request("a"), "request id 'a' is in use"),
        (Request("b", [], SamplingParams(), 4), "empty prompt"),
        (make_request("b", 60, 5), "65 tokens long, more than max_model_len=64"),
        (Request("b", [1, 2, 3], SamplingParams(), 3), "no place for a new one"),
        (make_request("b", source=make_request("c")), "source of request 'b' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.scheduler.add(bad)
    (done,) = engine.run()
    with pytest.raises(ValueError, match="has been scheduled before"):
        engine.scheduler.add(done)
    engine.assert_empty()


# Steps and budgets --------------------------------------------------------------------------------


@step_by_step
def test_one_request_from_prompt_to_limit() -> None:
    engine = FakeEngine()
    request = make_request("a", 5, 3)
    engine.add(request)
    assert chunks(engine.step()) == [("a", 5)]
    assert len(request.output_ids) == 1
    assert ids(engine.step().decodes) == ["a"]
    assert engine.ended == []
    assert ids(engine.step().decodes) == ["a"]
    assert engine.ended == [request]
    assert request.tokens == expected_tokens(request)
    assert request.finish_reason is FinishReason.LENGTH
    assert request.status is Status.FINISHED
    engine.assert_empty()
    stats = engine.scheduler.stats()
    assert (stats.steps, stats.scheduled_tokens, stats.preemptions) == (3, 7, 0)
    assert stats.finished == {"stop": 0, "length": 1, "abort": 0, "deadline": 0, "error": 0}


def test_a_long_prompt_is_cut_and_starves_nobody() -> None:
    engine = FakeEngine(max_num_batched_tokens=8, max_num_seqs=3)
    engine.add(make_request("a", 4, 12), make_request("long", 30, 2), make_request("b", 3, 4))
    plans = [engine.step() for _ in range(6)]
    assert chunks(plans[0]) == [("a", 4), ("long", 4)]
    assert plans[0].sampling == [plans[0].chunks[0][0]]
    for plan in plans[1:4]:
        assert ids(plan.decodes) == ["a"]
        assert chunks(plan) == [("long", 7)]
    assert chunks(plans[4]) == [("long", 5), ("b", 2)]
    assert plans[4].tokens == 8
    assert ids(plans[5].decodes) == ["a", "long", "b"]  # its last prompt token is like a decode
    assert chunks(plans[5]) == []
    engine.run()
    engine.assert_empty()


@step_by_step
def test_prompts_go_on_beside_as_many_decodes_as_possible() -> None:
    engine = FakeEngine(max_num_batched_tokens=4, max_num_seqs=4)
    engine.add(*(make_request(name, 1, 40) for name in "abc"), make_request("long", 20, 2))
    for _ in range(3):
        engine.step()
    counts = []
    while len(engine.ended) < 1:
        plan = engine.step()
        counts.append((len(plan.decodes), sum(n for _, n in plan.chunks)))
    assert (3, 1) in counts
    assert all(decodes >= 3 and decodes + prompt == 4 for decodes, prompt in counts)
    assert ids(engine.ended) == ["long"]


def test_whole_prompts_without_chunked_prefill() -> None:
    engine = FakeEngine(max_num_batched_tokens=32, max_model_len=32, enable_chunked_prefill=False)
    engine.add(make_request("a", 20, 4), make_request("b", 20, 4), make_request("c", 2, 4))
    assert chunks(engine.step()) == [("a", 20)]
    plan = engine.step()
    assert ids(plan.decodes) == ["a"]
    assert chunks(plan) == [("b", 20), ("c", 2)]
    for request in engine.run():
        assert request.tokens == expected_tokens(request)
    engine.assert_empty()


def test_no_more_sequences_than_allowed() -> None:
    engine = FakeEngine(max_num_seqs=2)
    engine.add(*(make_request(name, 2, 3) for name in "abcde"))
    while engine.scheduler.has_unfinished:
        plan = engine.step()
        assert len(plan.requests) <= 2
    assert ids(engine.ended) == list("abcde")
    engine.assert_empty()


def test_decodes_are_sorted_by_slot_and_lists_stay_as_given() -> None:
    engine = FakeEngine(max_num_seqs=4)
    engine.add(
        *(make_request(name, 2, new) for name, new in zip("abcd", (2, 9, 3, 9), strict=True))
    )
    given = []
    for i in range(6):
        plan = engine.step()
        given.append((plan, list(plan.decodes), list(plan.slots)))
        assert plan.slots[: len(plan.decodes)] == sorted(plan.slots[: len(plan.decodes)])
        engine.add(make_request(f"new{i}", 1 + i % 2, 3))  # a prompt of one joins the decodes
    assert all(plan.decodes == decodes and plan.slots == slots for plan, decodes, slots in given)


# Stopping -----------------------------------------------------------------------------------------


def test_stop_tokens_and_min_tokens() -> None:
    reference = expected_tokens(make_request("x", 4, 12))
    stop = reference[6]  # the third new token
    named = SamplingParams(max_tokens=12, stop_token_ids=[stop])
    late = SamplingParams(max_tokens=12, min_tokens=4)
    engine = FakeEngine()
    engine.add(
        make_request("eos", 4, 12, stop_ids=frozenset({stop})),
        make_request("named", 4, 12, stop_ids=frozenset({stop}), params=named),
        make_request("late", 4, 12, stop_ids=frozenset({stop}), params=late),
    )
    ended = {request.id: request for request in engine.run()}
    first = reference.index(stop, 4) + 1
    for name, reason in (("eos", None), ("named", stop)):
        assert ended[name].tokens == reference[:first]
        assert ended[name].finish_reason is FinishReason.STOP
        assert ended[name].stop_reason == reason
    assert len(ended["late"].output_ids) >= 4
    engine.assert_empty()


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    last = expected_tokens(make_request("x", 4, 2))[-1]
    engine = FakeEngine()
    engine.add(make_request("a", 4, 2, stop_ids=frozenset({last})))
    assert engine.run()[0].finish_reason is FinishReason.STOP


def test_a_stop_string_is_found_by_others() -> None:
    engine = FakeEngine()
    request = make_request("a", 4, 9)
    engine.add(request)
    engine.step()
    assert engine.scheduler.finish(request, FinishReason.STOP, stop_reason="\n\n")
    assert not engine.scheduler.finish(request, FinishReason.STOP)
    assert engine.scheduler.has_unfinished  # it has not been told yet
    assert engine.scheduler.take_finished() == [request]
    assert request.stop_reason == "\n\n"
    assert not engine.scheduler.has_unfinished
    engine.assert_empty()


@step_by_step
def test_timings() -> None:
    engine = FakeEngine()
    request = make_request("a", 4, 3)
    engine.now = 1.0
    engine.add(request)
    for _ in range(3):
        engine.now += 1.0
        engine.step()
    times = request.timings
    assert (times.arrival_s, times.scheduled_s, times.first_token_s) == (1.0, 2.0, 2.0)
    assert (times.last_token_s, times.finished_s) == (4.0, 4.0)


# Abort and deadline -------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["waiting", "staged", "running", "before launch", "in flight"])
def test_abort(moment: str) -> None:
    engine = FakeEngine(max_num_seqs=2)
    victim, other, third = make_request("v", 4, 6), make_request("o", 4, 6), make_request("t", 4, 2)
    engine.add(victim, other)

    def abort() -> None:
        assert engine.scheduler.abort("v")
        assert not engine.scheduler.abort(victim)

    if moment == "waiting":
        abort()
    elif moment == "staged":
        engine.add(third)
        engine.scheduler.abort(victim)
        victim = make_request("v", 4, 6)
        engine.add(victim)
        while victim.slot < 0:
            engine.step()
        assert victim.status is Status.WAITING
        abort()
    elif moment == "running":
        engine.step()
        abort()
    elif moment == "before launch":
        plan = engine.step(before_launch=abort)
        assert ids(plan.requests) == ["o"]
        assert ids(plan.sampling) == ["o"]
    else:
        plan = engine.step(in_flight=abort)
        assert ids(plan.sampling) == ["v", "o"]
        assert victim.output_ids == []
    engine.run()
    assert victim.finish_reason is FinishReason.ABORT
    assert engine.ended.count(victim) == 1
    assert other.tokens == expected_tokens(other)
    engine.assert_empty()


def test_abort_of_the_unknown_and_of_all() -> None:
    engine = FakeEngine()
    assert not engine.scheduler.abort("nobody")
    assert not engine.scheduler.abort(make_request("nobody"))
    engine.add(*(make_request(name) for name in "abcdef"))
    engine.step()
    engine.scheduler.abort_all()
    assert sorted(ids(engine.scheduler.take_finished())) == list("abcdef")
    engine.assert_empty()


@step_by_step
def test_deadlines_keep_what_there_is() -> None:
    engine = FakeEngine(max_num_seqs=2)
    engine.add(
        make_request("running", 4, 20, deadline_s=3.5),
        make_request("free", 4, 8),
        make_request("waiting", 4, 4, deadline_s=2.0),
        make_request("early", 4, 1, deadline_s=100.0),
    )
    while engine.scheduler.has_unfinished:
        engine.now += 1.0
        engine.step()
    reasons = {r.id: (r.finish_reason, len(r.output_ids)) for r in engine.ended}
    assert next(r for r in engine.ended if r.id == "waiting").timings.finished_s == 2.0
    assert reasons == {
        "running": (FinishReason.DEADLINE, 3),
        "free": (FinishReason.LENGTH, 8),
        "waiting": (FinishReason.DEADLINE, 0),
        "early": (FinishReason.LENGTH, 1),
    }
    engine.assert_empty()


# Memory -------------------------------------------------------------------------------------------


def test_the_latest_gives_way_and_returns_to_the_front() -> None:
    engine = FakeEngine(FakeMemory(budget=9), max_num_batched_tokens=24, max_num_seqs=3)
    engine.add(*(make_request(name, 8, 12) for name in "abc"), make_request("d", 1, 1))
    engine.run()
    log = engine.memory.log
    places = [i for i, (call, _) in enumerate(log) if call == "admit"]
    assert log[places[-1]] == ("admit", "d")  # not past those that gave way
    assert [log[i][1] for i in places[:3]] == [*"abc"]
    assert ("preempt", "c") in log
    assert ("preempt", "a") not in log
    assert log.index(("preempt", "c")) < log.index(("release", "a"))
    for request in engine.ended:
        assert request.tokens == expected_tokens(request)
    assert engine.scheduler.stats().preemptions == sum(r.preemptions for r in engine.ended) > 0
    engine.assert_empty()


@pytest.mark.parametrize("swap_pages", [0, 100])
def test_nobody_is_admitted_in_a_step_in_which_somebody_gave_way(swap_pages: int) -> None:
    engine = FakeEngine(FakeMemory(budget=7, swap_pages=swap_pages), max_num_seqs=4)
    engine.add(*(make_request(name, 8, 9) for name in "abcde"))
    while engine.scheduler.has_unfinished:
        begin, preemptions = len(engine.memory.log), engine.scheduler.stats().preemptions
        engine.step()
        calls = [call for call, _ in engine.memory.log[begin:]]
        if engine.scheduler.stats().preemptions > preemptions:
            assert "admit" not in calls
    assert engine.scheduler.stats().preemptions > 0
    for request in engine.ended:
        assert request.tokens == expected_tokens(request)
    engine.assert_empty()


@step_by_step
def test_a_victim_leaves_the_plan_and_its_tokens_go_to_others() -> None:
    engine = FakeEngine(FakeMemory(budget=9), max_num_batched_tokens=8, max_num_seqs=4)
    engine.add(make_request("a", 4, 20), make_request("b", 20, 2), make_request("c", 8, 2))
    engine.step()
    engine.memory.fail_grows = 1
    plan = engine.step()
    assert engine.scheduler.stats().preemptions == 1
    assert ids(plan.decodes) == ["a"]
    assert plan.chunks == []
    assert plan.slots == [0]
    engine.run()
    engine.assert_empty()


@step_by_step
def test_staged_requests_are_given_back_first() -> None:
    engine = FakeEngine(FakeMemory(budget=20), max_num_seqs=2)
    a, b, c = make_request("a", 4, 9), make_request("b", 4, 2), make_request("c", 4, 4)
    engine.add(a, b, c)
    engine.step()  # b ends with its next token, so c is staged in its place
    engine.step()
    assert (c.slot >= 0, c.status) == (True, Status.WAITING)
    engine.memory.fail_grows = 1
    engine.step()
    assert engine.memory.log[-1] != ("preempt", "a")
    assert ("preempt", "c") in engine.memory.log
    assert engine.scheduler.stats().preemptions == 0
    assert c.preemptions == 0
    engine.run()
    assert [r.tokens for r in (a, b, c)] == [expected_tokens(r) for r in (a, b, c)]
    engine.assert_empty()


@step_by_step
def test_of_the_staged_the_last_is_given_back() -> None:
    engine = FakeEngine(max_num_seqs=3)
    engine.add(make_request("a", 2, 9), *(make_request(name, 2, 2) for name in "bcde"))
    engine.step()
    engine.step()
    engine.memory.fail_grows = 1
    assert ids(engine.step().requests) == ["a", "d"]
    engine.run()
    engine.assert_empty()


@step_by_step
def test_who_gave_way_does_not_return_in_the_same_step() -> None:
    engine = FakeEngine(max_num_seqs=3, policy="priority")
    a, b, c = (make_request(name, 2, 9, priority=i) for i, name in enumerate("abc"))
    engine.add(a, b, c)
    engine.step()
    engine.memory.fail_grows = 2
    assert ids(engine.step().requests) == ["a"]
    assert (b.slot, c.slot) == (-1, -1)  # not even staged
    assert {*ids(engine.step().requests)} == {*"abc"}
    engine.run()
    engine.assert_empty()


@step_by_step
def test_a_lowered_budget_takes_from_those_who_need_nothing_more() -> None:
    engine = FakeEngine(FakeMemory(budget=20))
    engine.add(*(make_request(name, 5, 2) for name in "abc"))
    engine.step()
    engine.memory.budget = 4
    plan = engine.step()  # both pages of each are mapped already
    assert ids(plan.requests) == ["a", "b"]
    assert ids(engine.run()) == [*"abc"]
    engine.assert_empty()


def test_staging_maps_what_the_next_step_asks_for() -> None:
    engine = FakeEngine(max_num_seqs=3, max_num_batched_tokens=8)
    engine.add(make_request("a", 3, 6), make_request("b", 3, 3), make_request("c", 15, 2))
    engine.add(make_request("d", 6, 3), make_request("e", 6, 3))
    while engine.scheduler.has_unfinished:
        prepared = engine.memory.prepared
        plan = engine.step()
        if engine.steps > 1 and plan.slots:  # no stop token and no new request: all is foreseen
            assert dict(zip(plan.slots, plan.kv_lens, strict=True)) == prepared
    engine.assert_empty()


def test_without_staging_nothing_is_prepared() -> None:
    engine = FakeEngine(stage_ahead=False)
    engine.add(*(make_request(name) for name in "abcdef"))
    engine.run()
    assert engine.memory.prepared == {}
    engine.assert_empty()


def test_a_request_that_never_fits_fails_alone() -> None:
    engine = FakeEngine(FakeMemory(budget=4))
    engine.add(make_request("a", 4, 4), make_request("huge", 17, 4), make_request("b", 4, 4))
    ended = {request.id: request for request in engine.run()}
    assert ended["huge"].finish_reason is FinishReason.ERROR
    assert ended["huge"].error == "needs 5 pages, and the budget is 4 pages"
    assert {ended[name].finish_reason for name in "ab"} == {FinishReason.LENGTH}
    engine.assert_empty()


def test_the_only_one_left_fails_when_it_outgrows_the_budget() -> None:
    engine = FakeEngine(FakeMemory(budget=4))
    engine.add(make_request("a", 4, 30), make_request("b", 4, 4))
    first, second = sorted(engine.run(), key=lambda r: r.id)
    assert first.finish_reason is FinishReason.ERROR
    assert first.error == "needs 5 pages or more, and the budget is 4 pages"
    assert first.tokens == expected_tokens(first)[:17]
    assert second.finish_reason is FinishReason.LENGTH
    engine.assert_empty()


@step_by_step
def test_a_budget_that_shrinks_and_grows() -> None:
    engine = FakeEngine(FakeMemory(budget=20))
    engine.add(*(make_request(name, 8, 8) for name in "abcd"))
    engine.step()
    engine.step()
    engine.memory.budget = 6
    engine.step()
    assert len(engine.memory.references) <= 6
    assert {request for call, request in engine.memory.log if call == "preempt"} == {*"cd"}
    engine.memory.budget = 20
    for request in engine.run():
        assert request.finish_reason is FinishReason.LENGTH
        assert request.tokens == expected_tokens(request)
    engine.assert_empty()


def test_a_budget_below_one_request_fails_it_and_not_the_next() -> None:
    engine = FakeEngine(FakeMemory(budget=20))
    engine.add(make_request("big", 16, 8), make_request("small", 2, 2))
    engine.step()
    engine.step()
    engine.memory.budget = 3
    ended = {request.id: request for request in engine.run()}
    assert ended["big"].finish_reason is FinishReason.ERROR
    assert ended["small"].finish_reason is FinishReason.LENGTH
    engine.assert_empty()


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority", lambda request: len(request.prompt_ids)])
def test_memory_for_one_serves_all(policy: Policy, prefixes: bool) -> None:
    """No starvation: each takes its turn, and nobody's tokens are computed for ever."""
    memory = FakeMemory(budget=5, prefixes=prefixes)
    engine = FakeEngine(memory, max_num_seqs=8, policy=policy)
    engine.add(*(make_request(f"{i}", [i, 1, 2, 3, 4], 15) for i in range(8)))
    engine.run(most_steps=8 * 17)
    assert ids(engine.ended) == [str(i) for i in range(8)]
    for request in engine.ended:
        assert request.tokens == expected_tokens(request)
    engine.assert_empty()


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


# Misuse and the queue -----------------------------------------------------------------------------


@step_by_step
def test_steps_out_of_order_are_bugs() -> None:
    engine = FakeEngine()
    engine.add(make_request("a"))
    plan = engine.scheduler.schedule()
    again = engine.scheduler.schedule()  # the first was dropped
    with pytest.raises(AssertionError, match="only the latest plan"):
        engine.scheduler.computed(plan)
    engine.scheduler.computed(again)
    with pytest.raises(AssertionError, match="only the latest plan"):
        engine.scheduler.computed(again)
    with pytest.raises(AssertionError, match="has not been sampled"):
        engine.scheduler.schedule()
    engine.scheduler.sampled(again)
    with pytest.raises(AssertionError, match="has not been computed"):
        engine.scheduler.sampled(again)
    with pytest.raises(AssertionError, match="have not been appended"):
        engine.scheduler.schedule()
    engine.scheduler.append_tokens(again, [1])
    engine.scheduler.abort("a")
    assert engine.scheduler.schedule().requests == []


def test_check_finds_what_is_wrong() -> None:
    engine = FakeEngine()
    request = make_request("a")
    engine.add(request)
    engine.step()
    request.status = Status.WAITING
    with pytest.raises(AssertionError):
        engine.scheduler.check()


def test_a_queue_forgets_what_has_finished() -> None:
    queue = RequestQueue()
    requests = [make_request(str(i)) for i in range(10)]
    for order, request in enumerate(requests):
        request.order = order
        queue.push(-order // 2, request)
    assert len(queue) == 10
    for request in requests[3:]:
        request.status, request.finish_reason = Status.FINISHED, FinishReason.ABORT
        queue.forget()
        queue.check()
    assert len(queue) == 3
    assert len(queue._heap) <= 6
    assert ids([queue.pop() for _ in range(3)]) == ["1", "2", "0"]
    assert queue.first() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_plan_leaves_the_list_that_it_was_given() -> None:
    """Decodes of the step before may be the same list, and may still be in use."""
    first, second = make_request("a", 1, slot=3), make_request("b", 1, slot=1)
    decodes = [first]
    plan = Plan(decodes, [])
    plan.add(second, 1)
    plan.fill()
    assert (decodes, ids(plan.decodes), plan.slots) == ([first], ["b", "a"], [1, 3])
    plan.remove(second)
    plan.check()
    assert plan.decodes == [first]


# A step ahead of the tokens -----------------------------------------------------------------------


@pytest.fixture
def ahead() -> FakeEngine:
    return FakeEngine(steps_in_flight=1)


def test_a_token_is_computed_before_it_has_arrived(ahead: FakeEngine) -> None:
    request = make_request("a", 4, 3)
    ahead.add(request)
    seen = []
    while ahead.scheduler.has_unfinished:
        plan = ahead.step()
        seen.append((len(plan.requests), len(request.output_ids), request.in_flight))
    # Three steps with a new token each; the fourth only takes the last one.
    assert seen == [(1, 0, 1), (1, 1, 1), (1, 2, 1), (0, 3, 0)]
    assert request.tokens == expected_tokens(request)
    ahead.assert_empty()


def test_who_ended_by_a_stop_token_leaves_no_trace_of_the_step_after(ahead: FakeEngine) -> None:
    request = make_request("a", 4, 20)
    stop = expected_tokens(request)[7]
    request.stop_ids = frozenset([stop])
    ahead.add(request)
    ahead.run()
    assert request.tokens == expected_tokens(request)
    assert request.finish_reason is FinishReason.STOP
    assert ahead.memory.kept == [request.tokens]  # the stop token included, what follows it not
    ahead.step()
    assert (request.tokens, request.in_flight) == (expected_tokens(request), 0)
    ahead.assert_empty()


def test_nobody_gives_way_to_pages_that_the_tokens_in_flight_may_free() -> None:
    engine = FakeEngine(FakeMemory(budget=4, prefixes=False), steps_in_flight=1)
    ends, goes_on = make_request("a", 5, 6), make_request("b", 5, 6)
    ends.stop_ids = frozenset([expected_tokens(ends)[8]])  # when its second page is just not full
    engine.add(ends, goes_on)
    ended = engine.run()
    assert [r.preemptions for r in ended] == [0, 0]
    assert all(r.tokens == expected_tokens(r) for r in ended)
    engine.assert_empty()


def test_a_preempted_request_waits_for_its_own_token() -> None:
    engine = FakeEngine(FakeMemory(budget=1000), steps_in_flight=1)
    a, b = make_request("a", 4, 6), make_request("b", 4, 6)
    engine.add(a, b)
    engine.step()
    engine.scheduler._preempt(b)
    assert b.in_flight == 1
    plan = engine.scheduler.schedule()
    assert ids(plan.requests) == ["a"]  # there is room, but nobody knows what b goes on with
    engine.run()
    assert (a.tokens, b.tokens) == (expected_tokens(a), expected_tokens(b))
    engine.assert_empty()


def test_a_step_that_fails_takes_only_its_own_with_it(ahead: FakeEngine) -> None:
    a, b = make_request("a", 4, 6), make_request("b", 4, 1)
    ahead.add(a, b)
    ahead.step()
    plan = ahead.scheduler.schedule()
    assert ids(plan.requests) == ["a"]  # b has its last token in flight
    ahead.scheduler.computed(plan)
    ahead.scheduler.fail(plan, "it went wrong")
    ahead.check()
    ahead.run()
    assert (a.finish_reason, a.error) == (FinishReason.ERROR, "it went wrong")
    assert (b.finish_reason, b.tokens) == (FinishReason.LENGTH, expected_tokens(b))
    ahead.assert_empty()
