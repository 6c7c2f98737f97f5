"""The scheduler under groups of beams and ordinary requests, aborts, budgets and failures.

Every state is checked, every search is compared with one that nobody disturbs, and at the end
everything has been answered once and no page is left.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from tests.beam_model import expected_search, found_search, make_search
from tests.scheduler_model import assert_answered, machine_settings
from tests.test_scheduler_machine import PAGE_TOKENS, SchedulerMachine, prompts
from vattn.engine.beams import BeamGroup
from vattn.request import FinishReason
from vattn.sampling_params import BeamSearchParams

searches = st.builds(
    BeamSearchParams,
    beam_width=st.integers(1, 4),
    max_tokens=st.just(1),  # the group's own limit counts
    length_penalty=st.sampled_from([1.0, 0.0, -1.0, 2.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
)


class BeamMachine(SchedulerMachine):
    """Searches come among the requests, and go with all of their beams."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[BeamGroup] = []

    @rule(
        prompt=prompts,
        new=st.integers(1, 12),
        params=searches,
        eos=st.frozensets(st.integers(0, 49), max_size=12),
        priority=st.integers(0, 2),
        patience_s=st.none() | st.integers(0, 20),
    )
    def search(
        self,
        prompt: list[int],
        new: int,
        params: BeamSearchParams,
        eos: frozenset[int],
        priority: int,
        patience_s: int | None,
    ) -> None:
        if params.beam_width > self.engine.scheduler.max_num_seqs:
            return
        deadline_s = None if patience_s is None else self.engine.now + patience_s
        name = f"g{len(self.groups)}"
        group = make_search(
            name, prompt, new, params, eos_ids=eos, priority=priority, deadline_s=deadline_s
        )
        self.groups.append(group)
        self.engine.add(group.lead)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), moment=st.sampled_from(["between", "before_launch", "in_flight"]))
    def end_a_beam(self, data: st.DataObject, moment: str) -> None:
        group = data.draw(st.sampled_from(self.groups))
        beam = data.draw(st.sampled_from(group.members))

        def end() -> None:
            had_ended = beam.finished
            assert self.engine.scheduler.abort(beam.id) != had_ended
            assert all(beam.finished for beam in group.members)

        self._at(moment, end)

    @rule(calls=st.integers(1, 3))
    def fail_reorders(self, calls: int) -> None:
        self.engine.memory.fail_reorders = calls
        self.engine.step()
        self.engine.memory.fail_reorders = 0

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check()
        stats = self.engine.scheduler.stats()
        singles = sum(not request.finished for request in self.requests)
        groups = [group for group in self.groups if not group.lead.finished]
        assert stats.running + stats.waiting == singles + sum(len(g.members) for g in groups)
        answers = len(self.requests) - singles + len(self.groups) - len(groups)
        assert sum(stats.finished.values()) == answers

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        leads = [group.lead for group in self.groups]
        left = [r for r in [*self.requests, *leads] if not r.finished]
        # Each step computes something of the first in order, who never gives way; tokens of beams
        # arrive before the next step of theirs, and beams that come back are computed first.
        self.engine.run(most_steps=sum(12 * request.limit for request in left) + 4)
        self.engine.assert_empty()
        assert sorted(self.engine.ended, key=id) == sorted([*self.requests, *leads], key=id)
        smallest = 0 if self.disturbed else self.smallest_budget
        for request in self.requests:
            assert_answered(request, smallest_budget=smallest, page_tokens=PAGE_TOKENS)
        for group in self.groups:
            assert_searched(group, smallest_budget=smallest)


def assert_searched(group: BeamGroup, *, smallest_budget: int) -> None:
    """What a search ended with is right for its reason."""
    reason, error = group.lead.finish_reason, group.lead.error
    assert all(beam.finish_reason is reason for beam in group.members)
    if reason in (FinishReason.LENGTH, FinishReason.STOP):
        assert (found_search(group), reason) == expected_search(group)
    else:
        assert len(group.results()) <= group.width
    if reason is FinishReason.ERROR:
        assert error is not None
        assert "budget" in error
        assert -(-group.lead.limit // PAGE_TOKENS) * group.width > smallest_budget
    assert (reason is FinishReason.ERROR) == (error is not None)


TestBeams = BeamMachine.TestCase
TestBeams.settings = machine_settings(80)
