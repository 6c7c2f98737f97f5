"""Which requests the next step computes, and how many tokens of each; no torch here.

The policy is :meth:`Scheduler.schedule`: a budget of tokens per step, spent on running requests
first, in the manner of vLLM V1. One step of an engine::

    plan = scheduler.schedule()
    scheduler.computed(plan)
    ...  # launch the model
    scheduler.sampled(plan)  # its tokens are on their way
    scheduler.stage()  # maps for the next step while the device computes this one
    scheduler.append_tokens(plan, tokens)  # when they have arrived
    for request in scheduler.take_finished(): ...

With ``steps_in_flight=1`` the next step is scheduled before these tokens arrive. Requests that end
by their length are not in it, since that is known beforehand; those that turn out to have ended by
a stop token or string computed one token in vain, which is dropped. Their slots are released after
that step was launched, so the event that guards the release comes after all that could touch them.

Beams of one search, see :mod:`vattn.engine.gangs`, are requests of their own that come, run and go
together; ``advance_beams`` says what they go on with, after ``append_tokens``.

Why nobody starves: who came first (by the policy's order) among the running never gives way to
another and is in every plan, so it ends; and nobody is admitted past the head of the queue.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable

from vattn.config import positive_int
from vattn.engine.beams import BeamGroup
from vattn.engine.gangs import absent, at_gate, mates, wanted_tokens, width
from vattn.engine.policy import Memory, NeverFits, Plan, SchedulerStats, by_slot
from vattn.engine.ranks import Policy
from vattn.engine.score_room import ScoreRoom
from vattn.engine.speculation.proposer import may_draft, most_drafts
from vattn.engine.steps import Steps
from vattn.request import FinishReason, Request, Status

__all__ = ["Memory", "NeverFits", "Plan", "Policy", "Scheduler", "SchedulerStats"]


class Scheduler(Steps):
    """Decides over requests; owns their progress, status and place. For one thread.

    Args:
        memory: the KV cache.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens of a step.
        max_model_len: longest sequence in tokens.
        policy: ``"fcfs"``: who came first; ``"priority"``: smallest ``priority``, then who came
            first; a function: smallest of what it returns for a request, then who came first, see
            :mod:`.ranks`. Under the latter two a waiting request takes the place of running ones of
            a larger rank when sequences or pages are short.
        enable_chunked_prefill: prompts may be cut to what a step has left.
        stage_ahead: :meth:`stage` does something. Off only to compare.
        steps_in_flight: launched steps whose tokens may be missing when the next is scheduled.
        vocab_size: logits of a row; limits how many tokens of prompts a step can score.
        clock: seconds, as of ``time.monotonic``.

    Raises:
        ValueError: a setting out of range, or a step too small to be fair.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: Policy = "fcfs",
        enable_chunked_prefill: bool = True,
        stage_ahead: bool = True,
        steps_in_flight: int = 0,
        vocab_size: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            memory,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            policy=policy,
            steps_in_flight=steps_in_flight,
            clock=clock,
        )
        tokens = positive_int(max_num_batched_tokens, "max_num_batched_tokens")
        self.max_num_batched_tokens = tokens
        if tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={max_num_seqs}, so "
                "some sequence would get no token in a step; raise the former or lower the latter"
            )
        if not enable_chunked_prefill and tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={tokens} is less than max_model_len={max_model_len}; "
                "raise it, or leave enable_chunked_prefill on"
            )
        self.enable_chunked_prefill = enable_chunked_prefill
        self.stage_ahead = stage_ahead
        self._scores = ScoreRoom(vocab_size)

    # The policy -----------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """What the next step computes. Grows the slots to it; nothing else has happened yet.

        Running requests go first: one token each for those that decode, then the next chunks of
        prompts, which cannot starve, because a step has at least as many tokens as sequences. If
        their pages are short, the last in order gives way until the others fit. What tokens are
        left go to the head of the queue while sequences and pages last, but to nobody who would
        only take the place of one who has just given way. A long prompt that runs keeps the tokens
        that decodes leave to it, from more urgent requests too.

        An empty plan with requests left means that pages are in use elsewhere: try again later. If
        tokens are in flight it means that they had better arrive first: they may end requests, so
        that nobody has to give way.
        """
        assert self._computed is None, "the step before has not been sampled"
        assert len(self._launched) <= self.steps_in_flight, "tokens have not been appended"
        self._plan = self._barrier = None
        self._waiting.wake()
        self._expire()
        while (self._running or self._staged) and self.memory.over_budget():
            if self._launched:
                return self._wait()
            self._give_way()
        if not self._complete_groups():
            return self._wait()
        while True:
            plan = self._plan_running()
            if not plan.slots or self.memory.grow(plan.slots, plan.kv_lens):
                break
            if plan.verifies:  # guesses go before anybody does
                self._forget_drafts(plan)
                continue
            if self._launched:
                return self._wait()
            self._give_way()
        self._plan = plan
        added = False
        while (room := self.max_num_batched_tokens - plan.tokens) > 0:
            request = self._next()
            if request is None:
                break
            tokens = self._chunk(request, room)
            if not tokens and wanted_tokens(request) and not self._waits_for_scores(request):
                # A whole prompt that this step has no room for, but the next may.
                self._staged.insert(0, request)
                break
            self._start(request)
            if tokens and self._fits(request, tokens):
                plan.add(request, tokens)
                self._scores.spend(request, tokens)
                added = True
        if added:
            plan.fill()
        return plan

    def _wait(self) -> Plan:
        """Nothing, until the tokens that are in flight have arrived."""
        self._plan = Plan([], [])
        return self._plan

    def _plan_running(self) -> Plan:
        plan = Plan(self._running.decodes, [])
        self._scores.reset()
        room = self.max_num_batched_tokens - len(plan.decodes)
        for request in self._running.prefills:
            tokens = self._chunk(request, room)
            if not tokens:
                if room and self._waits_for_scores(request):
                    continue  # the first of them does not wait
                break
            plan.chunks.append((request, tokens))
            self._scores.spend(request, tokens)
            room -= tokens
        self._plan_drafts(plan, room)
        if plan.chunks or plan.verifies:
            plan.fill()
        return plan

    def _chunk(self, request: Request, room: int) -> int:
        """How many tokens of a prompt to compute, if ``room`` are left."""
        room = min(room, self._scores.tokens(request))
        if room >= (wanted := wanted_tokens(request)):
            return wanted
        return room if self.enable_chunked_prefill else 0

    def _waits_for_scores(self, request: Request) -> bool:
        """Whether others have left a prompt nothing of what a step can score.

        Nobody waits with it: it keeps its place, and those behind it go on.
        """
        left, wanted = self._scores.tokens(request), wanted_tokens(request)
        return left < min(wanted, 1) if self.enable_chunked_prefill else left < wanted

    def _next(self) -> Request | None:
        """The next to start, with a slot; None if nobody can."""
        if self._staged:
            return self._staged.pop(0) if self._has_place(self._staged[0]) else None
        while (head := self._waiting.first()) is not None:
            if self._barrier is not None and head.rank >= self._barrier:
                return None
            admitted = self._has_place(head) and self._admit(head)
            if admitted:
                return head
            if not head.finished and (admitted is None or not self._outrank(head)):
                return None
        return None

    def _admit(self, head: Request) -> bool | None:
        """Gives the head of the queue a slot; fails it if it can never have one.

        None if it had better wait for what another one computes, or for its own last token.
        """
        if head.in_flight:  # preempted since; the token is part of what it computes again
            return None
        if admitted := self._open(head):
            self._waiting.pop()
        return admitted

    def _has_place(self, request: Request) -> bool:
        return self._running.active + width(request) <= self.max_num_seqs

    def _open(self, request: Request) -> bool | None:
        """Gives a request a slot, or fails it, as :meth:`_admit`."""
        try:
            admitted = self.memory.admit(request)
        except NeverFits as error:
            self.finish(request, FinishReason.ERROR, error=str(error))
            return False
        assert not admitted or (request.slot >= 0 and request.uncomputed > 0), request
        return admitted

    def _fits(self, request: Request, tokens: int) -> bool:
        """Grows one that has just started. Others, or itself, give way if its pages are gone."""
        while not self.memory.grow([request.slot], [request.computed + tokens]):
            if self._plan is not None and self._plan.verifies:
                self._take_back_drafts(self._plan)
                continue
            self._give_way()
            if request.status is not Status.RUNNING:
                return False
        return True

    # Ahead of the next step -----------------------------------------------------------------------

    def stage(self) -> None:
        """Prepares the next step while the device computes this one; after :meth:`sampled`.

        Predicts what the next plan asks of the memory and has it mapped in the background, and
        gives waiting requests their slots if the next step has a place for them.
        """
        if not self.stage_ahead:
            return
        self._scores.reset()
        going = self._running.decodes + self._running.expected
        slots = [r.slot for r in going]
        # Whoever verifies drafts now is likely to get them all, and as many again.
        tokens = [min(r.computed + 1 + 2 * len(r.drafts), r.limit - 1) for r in going]
        room = self.max_num_batched_tokens - self._running.decoding
        coming = [*self._running.prefills, *self._staged]
        seqs = self._running.active + sum(map(width, self._staged))
        while room > 0:
            if coming:
                request = coming.pop(0)
            elif (head := self._stage_head(self.max_num_seqs - seqs)) is not None:
                request, seqs = head, seqs + width(head)
            else:
                break
            chunk = self._chunk(request, room)
            if not chunk:
                if wanted_tokens(request) and not self._waits_for_scores(request):
                    break
                continue
            self._scores.spend(request, chunk)
            slots.append(request.slot)
            tokens.append(request.computed + chunk)
            room -= chunk
        if slots:
            self.memory.prepare(slots, tokens)

    def _stage_head(self, places: int) -> Request | None:
        """Stages the head of the queue, if it fits and nobody has given way in this step."""
        while self._barrier is None and (head := self._waiting.first()) is not None:
            if width(head) <= places and self._admit(head):
                insort(self._staged, head, key=self._order)
                return head
            if not head.finished:
                break
        return None

    # Drafts ---------------------------------------------------------------------------------------

    def _plan_drafts(self, plan: Plan, room: int) -> None:
        """Has drafts verified by tokens of the step that nobody else has a use for."""
        drafting = [request for request in plan.decodes if request.drafts]
        if not drafting:
            return
        room -= self._coming_tokens()
        for request in drafting:
            drafts = min(len(request.drafts), most_drafts(request), room)
            if drafts > 0:
                assert not request.in_flight, request
                plan.verifies.append((request, drafts))
                room -= drafts
            else:
                request.drafts = []
        verifying = {request for request, _ in plan.verifies}
        plan.decodes = [request for request in plan.decodes if request not in verifying]

    def _coming_tokens(self) -> int:
        """Tokens that those who start next could compute in this step."""
        tokens = sum([request.uncomputed for request in self._staged])
        head = self._waiting.first()
        return tokens if head is None or not self._has_place(head) else tokens + head.uncomputed

    def _forget_drafts(self, plan: Plan) -> None:
        for request, _ in plan.verifies:
            request.drafts = []

    def may_draft(self) -> list[Request]:
        """The requests whose drafts the next step could verify, if they had some."""
        room = self.max_num_batched_tokens - len(self._running.decodes) - self._coming_tokens()
        room -= sum([request.uncomputed for request in self._running.prefills])
        return [r for r in self._running.decodes if may_draft(r)] if room > 0 else []

    def _take_back_drafts(self, plan: Plan) -> None:
        """Has a plan that is grown already decode without drafts."""
        requests = [request for request, _ in plan.verifies]
        self._forget_drafts(plan)
        for request in requests:
            self.memory.cut(request)
        plan.verifies = []
        plan.decodes = sorted(plan.decodes + requests, key=by_slot)
        plan.fill()
        while requests := [r for r in requests if r.status is Status.RUNNING]:
            if self.memory.grow([r.slot for r in requests], [r.computed + 1 for r in requests]):
                return
            self._give_way()

    # Beams ----------------------------------------------------------------------------------------

    def _complete_groups(self) -> bool:
        """Gives slots to beams whose lead has one; False if tokens in flight should arrive first.

        They come before everybody after their lead, who gives way to them. If that is not enough,
        the beams that have slots keep these, and nobody else is admitted until the others have
        theirs.
        """
        for lead in self._running.leads:
            # One may have given way to another just now, or be no further than its prompt.
            ready = lead.status is Status.RUNNING and at_gate(lead) and lead.uncomputed == 1
            if ready and not self._complete(lead.group):
                return False
        return True

    def _complete(self, group: BeamGroup) -> bool:
        lead = group.lead
        for beam in absent(group):
            while not self._open(beam):
                if lead.finished:
                    return True
                if self._comes_last(lead):
                    if self._launched or self._staged or not self._running.is_alone(lead):
                        self._bar(lead)
                    else:  # whoever has what it lacks may be waiting for what it has
                        self._give_way()
                    return True
                if self._launched:
                    return False
                self._give_way()
            self._start(beam)
        return True

    def _comes_last(self, request: Request) -> bool:
        """Whether nobody with a slot comes after a request that runs."""
        last = self._staged[-1] if self._staged else self._running.last()
        return bool(self._order(last) <= self._order(request))

    # Who gives way --------------------------------------------------------------------------------

    def _give_way(self) -> None:
        """Frees pages: the last in order of the staged, else of the running.

        The only one that is left fails, unless somebody outside holds what it lacks.
        """
        if self._staged:
            self._put_back(self._staged.pop())
            return
        last = mates(self._running.last())[0]
        if not self._running.is_alone(last) or (shortage := self.memory.shortage(last)) is None:
            self._preempt(last)
        else:
            self.finish(last, FinishReason.ERROR, error=shortage)

    def _outrank(self, head: Request) -> bool:
        """Unless who comes first is served first, preempts the last if ``head`` is more urgent."""
        if self.policy == "fcfs" or not self._running:
            return False
        victim = self._running.last()
        # Strictly: two of one rank would take each other's place for ever.
        if victim.rank <= head.rank:
            return False
        self._preempt(victim)
        return True

    def check(self) -> None:
        """See :meth:`.lifecycle.Lifecycle.check`; and that no plan is larger than a step."""
        super().check()
        assert self._plan is None or self._plan.tokens <= self.max_num_batched_tokens, self._plan
