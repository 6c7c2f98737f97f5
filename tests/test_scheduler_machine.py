"""The scheduler under random requests, aborts, deadlines, budgets and failures, step by step.

Every state is checked, every output is compared with that of a request left alone, and at the end
everything has been answered once and no page is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.scheduler_model import (
    FakeEngine,
    FakeMemory,
    assert_answered,
    expected_tokens,
    machine_settings,
    make_request,
)
from vattn.engine.scheduler import Policy
from vattn.request import FinishReason, Request

PAGE_TOKENS = 4
MAX_MODEL_LEN = 40

prompts = st.builds(
    # Few first parts, so that some prompts share them.
    lambda shared, own: [7] * shared + own,
    st.integers(0, 3).map(lambda n: 5 * n),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
)


def shortest_first(request: Request) -> int:
    return len(request.prompt_ids)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, and go in every way there is."""

    waits_for_tokens = False

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.disturbed = False  # a grow was made to fail, so whoever was alone may have failed

    def make_memory(self, budget: int, slots: int, swap_pages: int, prefixes: bool) -> Any:
        return FakeMemory(
            budget, PAGE_TOKENS, slots=slots, swap_pages=swap_pages, prefixes=prefixes
        )

    @initialize(
        budget=st.integers(4, 24),
        swap_pages=st.sampled_from([0, 3, 100]),
        prefixes=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "priority", shortest_first]),
        chunked=st.booleans(),
        stage_ahead=st.booleans(),
        steps_in_flight=st.integers(0, 1),
    )
    def start(
        self,
        budget: int,
        swap_pages: int,
        prefixes: bool,
        max_num_seqs: int,
        spare_tokens: int,
        policy: Policy,
        chunked: bool,
        stage_ahead: bool,
        steps_in_flight: int,
    ) -> None:
        memory = self.make_memory(budget, max_num_seqs + 2, swap_pages, prefixes)
        self.smallest_budget = budget
        self.engine = FakeEngine(
            memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=spare_tokens + (max_num_seqs if chunked else MAX_MODEL_LEN),
            max_model_len=MAX_MODEL_LEN,
            policy=policy,
            enable_chunked_prefill=chunked,
            stage_ahead=stage_ahead,
            steps_in_flight=steps_in_flight,
        )
        self.engine.waits_for_tokens = self.waits_for_tokens

    @rule(
        prompt=prompts,
        new=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
        patience_s=st.none() | st.integers(0, 20),
        stop=st.frozensets(st.integers(0, 49), max_size=2),
    )
    def add(
        self,
        prompt: list[int],
        new: int,
        n: int,
        priority: int,
        patience_s: int | None,
        stop: frozenset[int],
    ) -> None:
        deadline_s = None if patience_s is None else self.engine.now + patience_s
        first: Request | None = None
        for index in range(n):
            request = make_request(
                str(len(self.requests)),
                prompt,
                new,
                seed=index,
                index=index,
                source=first,
                priority=priority,
                deadline_s=deadline_s,
                stop_ids=stop,
            )
            first = first or request
            self.requests.append(request)
            self.engine.add(request)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), moment=st.sampled_from(["between", "before_launch", "in_flight"]))
    def end_one(self, data: st.DataObject, moment: str) -> None:
        request = data.draw(st.sampled_from(self.requests))
        reason = data.draw(st.sampled_from([FinishReason.ABORT, FinishReason.DEADLINE]))

        def end() -> None:
            had_ended = request.finished
            assert self.engine.scheduler.finish(request, reason) != had_ended

        self._at(moment, end)

    @rule(moment=st.sampled_from(["before_launch", "in_flight"]), budget=st.integers(1, 24))
    def move_budget(self, moment: str, budget: int) -> None:
        self._at(moment, lambda: self._set_budget(budget))

    @rule(calls=st.integers(1, 3))
    def fail_grows(self, calls: int) -> None:
        self.disturbed = True
        self.engine.memory.fail_grows = calls
        self.engine.step()
        self.engine.memory.fail_grows = 0

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.engine.now += seconds

    def _at(self, moment: str, action: Callable[[], None]) -> None:
        if moment == "between":
            action()
        elif moment == "before_launch":
            self.engine.step(before_launch=action)
        else:
            self.engine.step(in_flight=action)

    def _set_budget(self, budget: int) -> None:
        self.engine.memory.budget = budget
        self.smallest_budget = min(self.smallest_budget, budget)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check()
        stats = self.engine.scheduler.stats()
        alive = sum(not request.finished for request in self.requests)
        assert stats.running + stats.waiting == alive
        assert sum(stats.finished.values()) == len(self.requests) - alive

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        left = [request for request in self.requests if not request.finished]
        # Each step computes a token of the first in order, who never gives way.
        self.engine.run(most_steps=sum(4 * request.limit for request in left) + 4)
        self.engine.assert_empty()
        assert sorted(self.engine.ended, key=id) == sorted(self.requests, key=id)
        for request in self.requests:
            smallest = 0 if self.disturbed else self.smallest_budget
            assert_answered(request, smallest_budget=smallest, page_tokens=PAGE_TOKENS)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = machine_settings(400)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=10),
    budget=st.integers(8, 16),
    seqs=st.integers(1, 6),
    tokens=st.integers(0, 10),
    swap_pages=st.sampled_from([0, 2, 50]),
)
def test_first_come_first_served_is_fair(
    lengths: list[tuple[int, int]], budget: int, seqs: int, tokens: int, swap_pages: int
) -> None:
    """Whoever starts has no elder waiting, and nobody gives way to a younger one."""
    memory = FakeMemory(budget, PAGE_TOKENS, swap_pages=swap_pages, prefixes=False)
    engine = FakeEngine(memory, max_num_seqs=seqs, max_num_batched_tokens=seqs + tokens)
    requests = [make_request(str(i), [i] * prompt, new) for i, (prompt, new) in enumerate(lengths)]
    engine.add(*requests)
    while engine.scheduler.has_unfinished:
        plan = engine.step()
        for request in plan.requests:
            elders = requests[: request.order]
            assert all(elder.finished or elder.slot >= 0 for elder in elders)
        assert engine.steps <= sum(request.limit for request in requests)
    assert all(request.tokens == expected_tokens(request) for request in requests)
    assert requests[0].preemptions == 0
    engine.assert_empty()
