"""The scheduler with drafts: what is planned, what is accepted, and who gives way to whom."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.scheduler_model import (
    FakeEngine,
    FakeMemory,
    expected_tokens,
    machine_settings,
    make_request,
    next_token,
)
from tests.test_scheduler_machine import SchedulerMachine
from vattn.request import FinishReason, Request
from vattn.sampling_params import SamplingParams


def guesses(request: Request, right: int, wrong: int = 0) -> list[int]:
    """So many drafts that are right, and then so many that are not."""
    tokens = list(request.tokens)
    for _ in range(right):
        tokens.append(next_token(tokens, request.seed))
    for _ in range(wrong):
        tokens.append((next_token(tokens, request.seed) + 1) % 50)
    return tokens[len(request.tokens) :]


def speculating(
    right: int, wrong: int = 0, memory: FakeMemory | None = None, **options: int
) -> FakeEngine:
    engine = FakeEngine(memory, **options)
    engine.propose = lambda request: guesses(request, right, wrong)
    return engine


def counts(engine: FakeEngine) -> tuple[int, int, int, list[int]]:
    found = engine.scheduler.drafts
    return found.drafts, found.draft_tokens, found.accepted_tokens, found.accepted_per_position


def test_right_drafts_save_steps() -> None:
    engine = speculating(right=3)
    request = make_request("a", 4, new=13)
    engine.add(request)
    engine.run()
    # One token of the prompt's step, then four in each.
    assert engine.steps == 4
    assert request.tokens == expected_tokens(request)
    assert counts(engine) == (3, 9, 9, [3, 3, 3])
    engine.assert_empty()


def test_with_a_step_in_flight_a_request_waits_for_its_tokens() -> None:
    engine = speculating(right=3, steps_in_flight=1)
    engine.waits_for_tokens = True
    requests = [make_request(name, [i] * 4, new=9) for i, name in enumerate("ab")]
    engine.add(*requests)
    engine.run()
    assert all(r.tokens == expected_tokens(r) for r in requests)
    assert counts(engine)[:3] == (4, 12, 12)
    engine.assert_empty()


def test_wrong_drafts_leave_no_trace() -> None:
    engine = speculating(right=1, wrong=2)
    request = make_request("a", 4, new=12)
    engine.add(request)
    engine.step()
    engine.step()
    state = engine.memory.open[request.slot]
    assert state.content == expected_tokens(request)[:6]
    assert len(state.pages) == engine.memory.pages_for(6)
    engine.run()
    assert request.tokens == expected_tokens(request)
    assert counts(engine)[3] == [5, 0, 0]
    engine.assert_empty()
    assert engine.memory.kept == [expected_tokens(request)[:-1]]


def test_drafts_end_before_the_limit() -> None:
    engine = speculating(right=9)
    request = make_request("a", 4, new=6)
    engine.add(request)
    engine.step()
    plan = engine.step()
    assert plan.verifies == [(request, 4)]
    assert request.finish_reason is FinishReason.LENGTH
    assert request.tokens == expected_tokens(request)
    engine.assert_empty()


@pytest.mark.parametrize("at", range(1, 6))
def test_a_stop_token_among_accepted_drafts_ends_it_there(at: int) -> None:
    plain = make_request("a", 4, new=12, params=SamplingParams(max_tokens=12))
    outputs = expected_tokens(plain)[4:]
    stop = outputs[at]
    request = make_request("a", 4, new=12, stop_ids=frozenset([stop]))
    engine = speculating(right=4)
    engine.add(request)
    engine.run()
    whole = expected_tokens(request)
    assert request.tokens == whole
    assert request.finish_reason is FinishReason.STOP
    assert engine.memory.kept == [whole[:-1]]  # what came after it is not kept
    engine.assert_empty()


def test_drafts_get_what_tokens_are_left() -> None:
    engine = speculating(right=5, max_num_batched_tokens=8)
    engine.add(*[make_request(name, [i], new=20, seed=i) for i, name in enumerate("abc")])
    engine.step()
    plan = engine.step()
    assert plan.tokens == 8
    assert [n for _, n in plan.verifies] == [5]
    assert len(plan.decodes) == 2
    engine.run()
    assert all(r.tokens == expected_tokens(r) for r in engine.ended)


def test_prompts_go_before_drafts() -> None:
    engine = speculating(right=5, max_num_batched_tokens=8)
    first, second = make_request("a", 2, new=20), make_request("b", 20, new=3)
    engine.add(first)
    engine.step()
    engine.add(second)
    plan = engine.step()  # the head of the queue has a use for all that is left
    assert plan.verifies == []
    assert plan.chunks == [(second, 7)]
    assert engine.step().chunks == [(second, 7)]
    plan = engine.step()
    assert plan.chunks == [(second, 6)]
    assert plan.verifies == [(first, 1)]
    engine.run()
    assert first.tokens == expected_tokens(first)
    assert second.tokens == expected_tokens(second)


def test_nobody_drafts_where_no_token_is_left() -> None:
    engine = speculating(right=5, max_num_batched_tokens=2, max_num_seqs=2)
    engine.add(make_request("a", 1, new=5), make_request("b", [7], new=5))
    engine.step()
    assert engine.scheduler.may_draft() == []
    engine.run()
    assert counts(engine)[0] == 0


def test_drafts_go_before_anybody_gives_way() -> None:
    memory = FakeMemory(budget=4, page_tokens=4, prefixes=False)
    engine = speculating(right=6, memory=memory, max_num_batched_tokens=32)
    first, second = make_request("a", 7, new=9), make_request("b", [3] * 7, new=2)
    engine.add(first, second)
    engine.step()
    plan = engine.step()  # two pages each, and drafts of the first would take two more
    assert plan.verifies == []
    assert len(plan.decodes) == 2
    engine.run()
    assert engine.scheduler.stats().preemptions == 0
    assert [r.tokens for r in (first, second)] == [expected_tokens(r) for r in (first, second)]
    engine.assert_empty()


def test_drafts_in_flight_arrive_at_one_who_gave_way() -> None:
    """Their tokens are as good; what it had computed is gone."""
    options = {"max_num_seqs": 1, "steps_in_flight": 1, "policy": "priority"}
    engine = speculating(right=2, wrong=1, **options)  # type: ignore[arg-type]
    engine.waits_for_tokens = True
    patient, urgent = make_request("a", 4, new=20, priority=1), make_request("b", [7] * 4, new=3)
    engine.add(patient)
    for _ in range(3):
        engine.step()
    assert patient.in_flight
    assert patient.drafts
    known = len(patient.tokens)
    engine.add(urgent)
    engine.step()
    assert patient.slot == -1
    assert len(patient.tokens) == known + 3
    assert patient.drafts == []
    engine.run()
    assert [r.tokens for r in (patient, urgent)] == [expected_tokens(r) for r in (patient, urgent)]
    engine.assert_empty()


class Fussy(FakeMemory):
    """Whose pages are gone, once, when a request has just been admitted."""

    refuse = False

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        if self.refuse and len(slots) == 1 and not self.open[slots[0]].content:
            self.refuse = False
            return False
        return super().grow(slots, tokens)


def test_mapped_drafts_are_taken_back_for_one_who_starts() -> None:
    memory = Fussy(budget=100)
    engine = speculating(right=3, memory=memory, stage_ahead=False)
    first, second = make_request("a", 4, new=12), make_request("b", [3] * 5, new=4)
    engine.add(first)
    engine.step()
    engine.add(second)
    memory.refuse = True
    plan = engine.step()
    assert plan.decodes == [first]
    assert plan.chunks == [(second, 5)]
    engine.run()
    assert engine.scheduler.stats().preemptions == 0
    assert [r.tokens for r in (first, second)] == [expected_tokens(r) for r in (first, second)]
    engine.assert_empty()


@pytest.mark.parametrize("when", ["before_launch", "in_flight"])
def test_an_abort_drops_what_was_guessed(when: str) -> None:
    engine = speculating(right=2, wrong=2)
    request, other = make_request("a", 4, new=12), make_request("b", [3] * 4, new=12)
    engine.add(request, other)
    engine.step()
    known = list(request.tokens)
    engine.step(**{when: lambda: engine.scheduler.abort(request)})
    assert request.tokens == known
    assert counts(engine)[0] == 1  # of the other
    assert engine.memory.kept == [known[:-1] if when == "before_launch" else known]
    engine.run()
    assert other.tokens == expected_tokens(other)
    engine.assert_empty()


def test_who_may_not_draft() -> None:
    asked: list[Request] = []

    def propose(request: Request) -> list[int]:
        asked.append(request)
        return []

    engine = FakeEngine(max_num_batched_tokens=64)
    engine.propose = propose
    refused = [
        make_request("needs", 4, new=4, needs_tokens=True),
        make_request("grammar", [2] * 4, new=4, grammar=object()),
        make_request("last", [4] * 4, new=2),
    ]
    patient = SamplingParams(max_tokens=6, min_tokens=3)
    late = make_request("late", [5] * 4, new=6, params=patient)
    engine.add(*refused, late)
    engine.run()
    assert set(asked) == {late}
    assert len(asked) == 2  # with 3 and 4 of its tokens; the sixth needs none
    engine.assert_empty()


class SpeculatingMachine(SchedulerMachine):
    """The scheduler's machine, with drafts of any luck from any moment on."""

    waits_for_tokens = True

    @rule(seed=st.integers(0, 1 << 16), most=st.integers(0, 9))
    def speculate(self, seed: int, most: int) -> None:
        self.engine.propose = gambler(seed, most)


def gambler(seed: int, most: int) -> Callable[[Request], list[int]]:
    """Drafts of which a random number is right."""
    rng = random.Random(seed)

    def propose(request: Request) -> list[int]:
        right = rng.randint(0, most)
        return guesses(request, right, rng.randint(0, most - right))

    return propose


TestSpeculation = SpeculatingMachine.TestCase
TestSpeculation.settings = machine_settings(300)
