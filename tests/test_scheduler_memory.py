"""The scheduler when pages are short, and when tokens are still in flight."""

from __future__ import annotations

import pytest

from tests.scheduler_cases import (
    ids,
    pytest_generate_tests,
    step_by_step,
    steps_in_flight,
)
from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.engine.scheduler import Policy
from vattn.request import FinishReason, Status

__all__ = ["pytest_generate_tests", "steps_in_flight"]  # pytest finds them by their names


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
