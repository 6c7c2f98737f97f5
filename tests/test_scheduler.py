"""The scheduler on a memory that counts pages: steps, ends, misuse."""

from __future__ import annotations

import pytest

from tests.scheduler_cases import (
    chunks,
    ids,
    pytest_generate_tests,
    step_by_step,
    steps_in_flight,
)
from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.engine.scheduler import Plan, Scheduler
from vattn.engine.waiting import RequestQueue
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams

__all__ = ["pytest_generate_tests", "steps_in_flight"]  # pytest finds them by their names


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
