"""Groups of beams in the scheduler: places, pages, and that they come and go as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from tests.beam_model import expected_search, found_search, make_search
from tests.scheduler_model import FakeEngine, FakeMemory, expected_tokens, make_request
from vattn.engine.beams import BeamGroup
from vattn.request import FinishReason, Request, Status


@pytest.fixture(params=[0, 1], ids=["", "ahead"])
def ahead(request: pytest.FixtureRequest) -> int:
    """Steps in flight."""
    return int(request.param)


def engine_of(
    budget: int = 1000, *, ahead: int, prefixes: bool = True, **options: Any
) -> FakeEngine:
    memory = FakeMemory(budget, prefixes=prefixes)
    return FakeEngine(memory, steps_in_flight=ahead, **options)


def assert_found(*groups: BeamGroup) -> None:
    for group in groups:
        assert (found_search(group), group.lead.finish_reason) == expected_search(group)


def running(engine: FakeEngine) -> list[str]:
    return sorted(request.id for request in engine.scheduler._running)


def until(engine: FakeEngine, done: Any, most: int = 50) -> None:
    for _ in range(most):
        if done():
            return
        engine.step()
    raise AssertionError("it does not come to that")


# Places -------------------------------------------------------------------------------------------


def test_a_group_takes_its_places_from_the_start(ahead: int) -> None:
    """Nobody takes a place that a beam will need, and nobody passes a group that waits for some."""
    engine = engine_of(ahead=ahead, max_num_seqs=4, max_num_batched_tokens=4)
    first = make_request("a", 2, 9)
    group = make_search("g", [1, 2, 3, 4, 5, 6, 7, 8, 9], 6, width=3)
    last = make_request("b", 2, 9)
    engine.add(first, group.lead, last)
    until(engine, lambda: group.lead.status is Status.RUNNING)
    assert running(engine) == ["a", "g"]
    assert engine.scheduler._running.active == 4
    until(engine, lambda: len(running(engine)) == 4)
    assert running(engine) == ["a", "g", "g/1", "g/2"]
    assert last.status is Status.WAITING
    engine.run()
    assert_found(group)
    assert last.tokens == expected_tokens(last)
    engine.assert_empty()


def test_a_group_waits_for_as_many_places_as_it_is_wide(ahead: int) -> None:
    engine = engine_of(ahead=ahead, max_num_seqs=4)
    requests = [make_request(str(i), 2, 3 + i) for i in range(3)]
    group = make_search("g", [1, 2], 6, width=3)
    later = make_request("z", 2, 2)
    engine.add(*requests, group.lead, later)
    until(engine, lambda: group.lead.status is Status.RUNNING)
    assert sum(request.finished for request in requests) >= 2
    assert later.status is Status.WAITING  # it comes after the group, though it had a place
    engine.run()
    assert_found(group)
    engine.assert_empty()


def test_a_group_wider_than_the_places_is_refused() -> None:
    engine = engine_of(ahead=0, max_num_seqs=4)
    with pytest.raises(ValueError, match="beam_width=5 is more than max_num_seqs=4"):
        engine.add(make_search("g", [1, 2], 6, width=5).lead)
    engine.assert_empty()


def test_a_more_urgent_group_takes_the_places_of_others(ahead: int) -> None:
    engine = engine_of(ahead=ahead, max_num_seqs=4, policy="priority")
    requests = [make_request(str(i), 2, 12, priority=2) for i in range(4)]
    engine.add(*requests)
    engine.step()
    group = make_search("g", [1, 2], 6, width=3, priority=1)
    engine.add(group.lead)
    until(engine, lambda: group.lead.status is Status.RUNNING)
    assert running(engine) == ["0", "g"]
    engine.run()
    assert_found(group)
    assert all(request.tokens == expected_tokens(request) for request in requests)
    assert [request.preemptions for request in requests] == [0, 1, 1, 1]
    engine.assert_empty()


def test_a_more_urgent_request_takes_the_place_of_a_whole_group(ahead: int) -> None:
    engine = engine_of(ahead=ahead, max_num_seqs=3, policy="priority")
    group = make_search("g", [1, 2], 12, width=3, priority=1)
    engine.add(group.lead)
    until(engine, lambda: len(running(engine)) == 3)
    urgent = make_request("u", 2, 3)
    engine.add(urgent)
    until(engine, lambda: urgent.status is Status.RUNNING)
    assert running(engine) == ["u"]
    assert all(beam.slot < 0 for beam in group.members)
    engine.run()
    assert_found(group)
    assert {beam.preemptions for beam in group.members} == {1}
    engine.assert_empty()


# Steps --------------------------------------------------------------------------------------------


def test_beams_decode_in_the_same_steps_and_only_when_their_tokens_are_there(ahead: int) -> None:
    engine = engine_of(ahead=ahead)
    group = make_search("g", [1, 2, 3], 7, width=3)
    engine.add(group.lead)
    steps = []
    while engine.scheduler.has_unfinished:
        plan = engine.step()
        assert not any(request.in_flight > 1 for request in group.members)
        steps.append(sorted(request.id for request in plan.requests))
    beams = ["g", "g/1", "g/2"]
    nothing: list[list[str]] = [[]] * ahead
    assert steps == [["g"], *nothing, *(6 * [beams, *nothing])]
    assert_found(group)
    engine.assert_empty()


def test_a_fork_of_the_lead_computes_nothing_again(ahead: int) -> None:
    engine = engine_of(ahead=ahead, prefixes=False)
    group = make_search("g", range(1, 14), 5, width=4)
    engine.add(group.lead)
    until(engine, lambda: len(running(engine)) == 4)
    assert engine.memory.forks == 3
    # Full pages of the prompt are those of the lead; each beam has one more.
    assert len(engine.memory.references) == 3 + 4
    engine.run()
    assert engine.scheduler.stats().scheduled_tokens == 13 + 4 * 4
    assert_found(group)
    engine.assert_empty()


def test_beams_that_come_back_compute_all_but_their_last_token(ahead: int) -> None:
    """In chunks, each at its own pace; none decodes before all can."""
    engine = engine_of(
        ahead=ahead, prefixes=False, max_num_batched_tokens=4, max_num_seqs=4, policy="priority"
    )
    group = make_search("g", [1, 2, 3], 14, width=3, priority=1)
    engine.add(group.lead)
    until(engine, lambda: len(group.lead.tokens) >= 10 and group.lead.slot >= 0)
    engine.scheduler._preempt(group.lead)
    engine.check()
    seen: list[tuple[int, int]] = []
    while not seen or not seen[-1][0]:
        plan = engine.step()
        seen.append((len(plan.decodes), sum(tokens for _, tokens in plan.chunks)))
    assert seen[-1] == (3, 0)
    assert sum(tokens for _, tokens in seen) >= 9
    assert len(seen) > 9 // 4
    engine.run()
    assert_found(group)
    engine.assert_empty()


# Pages --------------------------------------------------------------------------------------------


def test_the_last_group_gives_way_as_a_whole(ahead: int) -> None:
    engine = engine_of(9, ahead=ahead, prefixes=False, max_num_seqs=8)
    groups = [make_search(name, [1, 2, 3], 10, width=3) for name in "ab"]
    engine.add(*(group.lead for group in groups))
    until(engine, lambda: groups[1].lead.preemptions > 0, 100)
    assert {beam.status for beam in groups[1].members} == {Status.WAITING}
    assert {beam.slot for beam in groups[1].members} == {-1}
    assert groups[0].lead.preemptions == 0
    engine.run()
    assert_found(*groups)
    engine.assert_empty()


def test_those_after_a_group_give_way_to_its_beams(ahead: int) -> None:
    """A younger one has taken the pages, by the time that the prompt is computed."""
    engine = engine_of(8, ahead=ahead, prefixes=False, max_num_seqs=8, max_num_batched_tokens=12)
    group = make_search("g", [1] * 16, 4, width=4)  # a page more for each
    young = make_request("y", 5, 9)
    engine.add(group.lead, young)
    engine.step()
    engine.step()
    assert running(engine) == ["g", "y"]
    until(engine, lambda: group.started and group.members[-1].slot >= 0)
    assert running(engine) == ["g", "g/1", "g/2", "g/3"]
    assert young.preemptions == 1
    engine.run()
    assert_found(group)
    assert young.tokens == expected_tokens(young)
    engine.assert_empty()


def test_beams_wait_for_those_before_them(ahead: int) -> None:
    """They keep what they have, and nobody else is admitted before they are all there."""
    engine = engine_of(8, ahead=ahead, prefixes=False, max_num_seqs=8, max_num_batched_tokens=32)
    old = make_request("o", 14, 8)  # four pages, then up to six
    group = make_search("g", [1] * 8, 4, width=4)  # two pages, and one more for each
    later = make_request("z", 1, 1)
    engine.add(old, group.lead)
    until(engine, lambda: group.started)
    engine.add(later)
    engine.step()
    assert [beam.slot < 0 for beam in group.members] == [False, False, False, True]
    while not old.finished:
        assert later.status is Status.WAITING
        engine.step()
    engine.run()
    assert old.preemptions == 0
    assert_found(group)
    assert later.finish_reason is FinishReason.LENGTH
    engine.assert_empty()


def test_a_group_that_is_alone_and_does_not_fit_fails(ahead: int) -> None:
    engine = engine_of(6, ahead=ahead)
    group = make_search("g", [1, 2, 3], 12, width=4)
    engine.add(group.lead, make_request("b", 3, 3))
    ended = engine.run()
    assert {beam.finish_reason for beam in group.members} == {FinishReason.ERROR}
    assert group.lead.error is not None
    assert "the budget is 6 pages" in group.lead.error
    assert {request.id for request in ended} == {"b", "g"}
    engine.assert_empty()


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("moment", ["between", "before_launch", "in_flight"])
def test_the_end_of_a_beam_is_that_of_its_group(which: int, moment: str, ahead: int) -> None:
    engine = engine_of(ahead=ahead)
    group, other = make_search("g", [1, 2], 9, width=3), make_request("o", 3, 9)
    engine.add(group.lead, other)
    until(engine, lambda: len(group.lead.tokens) == 5)
    beam: Request = group.members[which]

    def end() -> None:
        assert engine.scheduler.abort(beam.id)
        assert not engine.scheduler.abort(group.members[1].id)

    if moment == "between":
        end()
    elif moment == "before_launch":
        engine.step(before_launch=end)
    else:
        engine.step(in_flight=end)
    assert {beam.finish_reason for beam in group.members} == {FinishReason.ABORT}
    ended = engine.run()
    assert [request.id for request in ended] == ["g", "o"]
    assert len(group.results()) == 3
    assert other.tokens == expected_tokens(other)
    assert sum(engine.scheduler.stats().finished.values()) == 2
    engine.assert_empty()


def test_a_step_that_fails_ends_its_groups(ahead: int) -> None:
    engine = engine_of(ahead=ahead)
    group = make_search("g", [1, 2], 9, width=3)
    engine.add(group.lead)
    until(engine, lambda: len(group.lead.tokens) == 5 and not group.lead.in_flight)
    plan = engine.scheduler.schedule()
    assert len(plan.requests) == 3
    engine.scheduler.computed(plan)
    engine.scheduler.fail(plan, "it went wrong")
    engine.flying = None
    engine.check()
    assert {beam.error for beam in group.members} == {"it went wrong"}
    assert engine.scheduler.take_finished() == [group.lead]
    engine.assert_empty()


def test_all_is_lost_with_its_beams(ahead: int) -> None:
    engine = engine_of(ahead=ahead)
    group = make_search("g", [1, 2], 9, width=3)
    engine.add(group.lead)
    until(engine, lambda: len(group.lead.tokens) == 5)
    engine.scheduler.lose_all("the roof fell in")
    assert engine.scheduler.take_finished() == [group.lead]
    assert {beam.error for beam in group.members} == {"the roof fell in"}
    assert not engine.scheduler.has_unfinished
    engine.scheduler.check()
