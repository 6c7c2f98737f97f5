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

Why nobody starves: who came first (by the policy's order) among the running never gives way to
another and is in every plan, so it ends; and nobody is admitted past the head of the queue.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Literal

from vattn.config import positive_int
from vattn.engine.policy import Memory, NeverFits, Plan, SchedulerStats
from vattn.engine.running import RunningSet
from vattn.engine.waiting import RequestQueue, WaitingRoom
from vattn.request import FinishReason, Request, Status

__all__ = ["Memory", "NeverFits", "Plan", "Policy", "Scheduler", "SchedulerStats"]

Policy = Literal["fcfs", "priority"]
# Prompt tokens of a step whose log probabilities are wanted: each has a row of logits, which for a
# vocabulary of 128K is half a megabyte.
MAX_SCORED_TOKENS = 1024
_ORDERS: dict[str, Callable[[Request], Any]] = {
    "fcfs": attrgetter("order"),
    "priority": attrgetter("priority", "order"),
}


class Scheduler:
    """Decides over requests; owns their progress, status and place. For one thread.

    A request is in one of three places. *Waiting*: new or preempted, without a slot. *Staged*: has
    its slot early, for the next step; nothing has been computed since. *Running*.

    Args:
        memory: the KV cache.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most tokens of a step.
        max_model_len: longest sequence in tokens.
        policy: ``"fcfs"``: who came first; ``"priority"``: smallest ``priority``, then who came
            first. Under the latter a waiting request takes the place of running ones of a larger
            number when sequences or pages are short.
        enable_chunked_prefill: prompts may be cut to what a step has left.
        stage_ahead: :meth:`stage` does something. Off only to compare.
        steps_in_flight: launched steps whose tokens may be missing when the next is scheduled.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = memory
        self.max_num_seqs = positive_int(max_num_seqs, "max_num_seqs")
        self.max_model_len = positive_int(max_model_len, "max_model_len")
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
        if policy not in _ORDERS:
            raise ValueError(f"policy={policy!r} must be one of {', '.join(_ORDERS)}")
        self.policy = policy
        self.enable_chunked_prefill = enable_chunked_prefill
        self.stage_ahead = stage_ahead
        self.steps_in_flight = steps_in_flight
        self._clock = clock
        self._order = _ORDERS[policy]

        self._clear()
        self._ended: list[Request] = []
        self._arrivals = self._steps = self._scheduled_tokens = self._preemptions = 0
        self._finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})

    def _clear(self) -> None:
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._waiting = WaitingRoom(self._order)
        self._staged: list[Request] = []  # in order
        self._running = RunningSet(self._order)
        self._deadlines = RequestQueue()

        self._plan: Plan | None = None  # until it is launched
        self._computed: Plan | None = None  # until its tokens are sampled
        self._launched: deque[Plan] = deque()  # until their tokens have arrived
        self._barrier: int | None = None  # the smallest rank that gave way in this step
        self._score_room = MAX_SCORED_TOKENS  # of which this step has so many left

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
        while True:
            plan = self._plan_running()
            if not plan.slots or self.memory.grow(plan.slots, plan.kv_lens):
                break
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
            if not tokens:  # a whole prompt that this step has no room for, but the next may
                self._staged.insert(0, request)
                break
            self._start(request)
            if self._fits(request, tokens):
                plan.add(request, tokens)
                self._spend_scores(request, tokens)
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
        self._score_room = MAX_SCORED_TOKENS
        room = self.max_num_batched_tokens - len(plan.decodes)
        for request in self._running.prefills:
            tokens = self._chunk(request, room)
            if not tokens:
                break
            plan.chunks.append((request, tokens))
            self._spend_scores(request, tokens)
            room -= tokens
        if plan.chunks:
            plan.fill()
        return plan

    def _chunk(self, request: Request, room: int) -> int:
        """How many tokens of a prompt to compute, if ``room`` are left."""
        wanted = request.uncomputed
        if request.prompt_logprobs is not None and self.enable_chunked_prefill:
            room = min(room, self._score_room)
        if wanted <= room:
            return wanted
        return room if self.enable_chunked_prefill else 0

    def _spend_scores(self, request: Request, tokens: int) -> None:
        if request.prompt_logprobs is not None:
            self._score_room -= tokens

    def _next(self) -> Request | None:
        """The next to start, with a slot; None if nobody can."""
        if self._staged:
            return self._staged.pop(0) if self._running.active < self.max_num_seqs else None
        while (head := self._waiting.first()) is not None:
            if self._barrier is not None and self._rank(head) >= self._barrier:
                return None
            admitted = self._running.active < self.max_num_seqs and self._admit(head)
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
        try:
            if not (admitted := self.memory.admit(head)):
                return admitted
        except NeverFits as error:
            self.finish(head, FinishReason.ERROR, error=str(error))
            return False
        assert head.slot >= 0, head
        assert head.uncomputed > 0, head
        self._waiting.pop()
        return True

    def _fits(self, request: Request, tokens: int) -> bool:
        """Grows one that has just started. Others, or itself, give way if its pages are gone."""
        while not self.memory.grow([request.slot], [request.computed + tokens]):
            self._give_way()
            if request.status is not Status.RUNNING:
                return False
        return True

    # Who gives way --------------------------------------------------------------------------------

    def _rank(self, request: Request) -> int:
        return request.priority if self.policy == "priority" else 0

    def _give_way(self) -> None:
        """Frees pages: the last in order of the staged, else of the running.

        The only one that is left fails, unless somebody outside holds what it lacks.
        """
        if self._staged:
            self._put_back(self._staged.pop())
        elif len(self._running) > 1:
            self._preempt(self._running.last())
        else:
            (request,) = self._running
            shortage = self.memory.shortage(request)
            if shortage is None:
                self._preempt(request)
            else:
                self.finish(request, FinishReason.ERROR, error=shortage)

    def _outrank(self, head: Request) -> bool:
        """Under the priority policy, preempts the last in order if ``head`` is more urgent."""
        if self.policy != "priority" or not self._running:
            return False
        victim = self._running.last()
        # Strictly: two of one priority would take each other's place for ever.
        if victim.priority <= head.priority:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, request: Request) -> None:
        self._remove_running(request)
        request.preemptions += 1
        self._preemptions += 1
        self._put_back(request)

    def _put_back(self, request: Request) -> None:
        self.memory.preempt(request)
        assert request.slot == -1, request
        assert request.computed == 0, request
        request.status = Status.WAITING
        self._waiting.push(request)
        rank = self._rank(request)
        self._barrier = rank if self._barrier is None else min(rank, self._barrier)

    # Around a step --------------------------------------------------------------------------------

    def computed(self, plan: Plan) -> None:
        """Says that ``plan`` is launched: its tokens count as computed from now on."""
        assert plan is self._plan, "only the latest plan can be launched, and only once"
        for request in plan.decodes:
            request.computed += 1
        for request, _ in plan.verifies:
            request.computed += 1  # of its drafts nothing is certain yet
        for request, tokens in plan.chunks:
            self._running.advance(request, tokens)
        self._plan, self._computed = None, plan
        self._steps += 1
        self._scheduled_tokens += plan.tokens

    def sampled(self, plan: Plan) -> None:
        """Says that the next tokens of ``plan.sampling`` are on their way."""
        assert plan is self._computed, "the plan has not been computed"
        self._computed = None
        if not plan.is_told:
            return
        for request in plan.receivers:
            request.in_flight += 1
            if request.computed + 1 >= request.limit:  # that is its length, now
                self._running.wait_for_last(request)
        self._launched.append(plan)

    def stage(self) -> None:
        """Prepares the next step while the device computes this one; after :meth:`sampled`.

        Predicts what the next plan asks of the memory and has it mapped in the background, and
        gives waiting requests their slots if the next step has a place for them.
        """
        if not self.stage_ahead:
            return
        self._score_room = MAX_SCORED_TOKENS
        going = self._running.decodes
        slots = [r.slot for r in going]
        tokens = [r.computed + 1 for r in going]
        room = self.max_num_batched_tokens - len(going)
        coming = [*self._running.prefills, *self._staged]
        seqs = len(going) + len(coming)
        while room > 0:
            if coming:
                request = coming.pop(0)
            elif seqs < self.max_num_seqs and (head := self._stage_head()) is not None:
                request, seqs = head, seqs + 1
            else:
                break
            chunk = self._chunk(request, room)
            if not chunk:
                break
            slots.append(request.slot)
            tokens.append(request.computed + chunk)
            room -= chunk
        if slots:
            self.memory.prepare(slots, tokens)

    def _stage_head(self) -> Request | None:
        """Stages the head of the queue, if it fits and nobody has given way in this step."""
        while self._barrier is None and (head := self._waiting.first()) is not None:
            if self._admit(head):
                insort(self._staged, head, key=self._order)
                return head
            if not head.finished:
                break
        return None

    def append_tokens(self, plan: Plan, tokens: Sequence[int]) -> int:
        """Appends the sampled tokens of a launched step, and ends requests that are complete.

        Args:
            plan: the oldest one whose tokens are missing.
            tokens: of :attr:`Plan.sampling`, as Python integers. Requests that have ended meanwhile
                are passed over.

        Returns:
            How many tokens were appended.
        """
        oldest = self._launched.popleft()
        assert oldest is plan, "tokens arrive in the order of the steps"
        now = self._clock()
        drafts = dict(plan.verifies)
        appended = row = 0
        for request in plan.receivers:
            request.in_flight -= 1
            rows = 1 + drafts.get(request, 0)
            if request.status is not Status.FINISHED:
                if rows == 1:
                    self._append(request, tokens[row], now)
                    appended += 1
                else:
                    appended += self._append_verified(request, tokens[row : row + rows], now)
            row += rows
        return appended

    def _append(self, request: Request, token: int, now: float) -> None:
        """One more token; it may be the last."""
        known = request.tokens
        known.append(token)
        timings = request.timings
        timings.last_token_s = now
        if not timings.first_token_s:
            timings.first_token_s = now
        if token in request.stop_ids or len(known) >= request.limit:
            self._stop(request, token)

    def _append_verified(self, request: Request, tokens: Sequence[int], now: float) -> int:
        """The drafts that were guessed right, and the token after them; how many these are."""
        raise NotImplementedError

    def fail(self, plan: Plan, error: str) -> None:
        """Ends all requests of a plan whose step went wrong; its tokens never arrive."""
        self._computed = None
        self.drop(plan)
        for request in plan.requests:
            self.finish(request, FinishReason.ERROR, error=error)

    def drop(self, plan: Plan) -> None:
        """Says that nobody waits for the tokens of a launched plan."""
        if plan in self._launched:
            self._launched.remove(plan)
            for request in plan.receivers:
                request.in_flight -= 1

    def _stop(self, request: Request, token: int) -> None:
        """Ends a request whose last token may be the last; as vLLM, without reason for EOS."""
        outputs = len(request.tokens) - len(request.prompt_ids)
        if token in request.stop_ids and outputs >= request.params.min_tokens:
            reason = token if token in request.params.stop_ids else None
            self.finish(request, FinishReason.STOP, stop_reason=reason)
        elif len(request.tokens) >= request.limit:
            self.finish(request, FinishReason.LENGTH)

    # Requests come and go -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a new request. One with a ``source`` waits for the source's prompt.

        Raises:
            ValueError: an id in use, an empty prompt, or lengths beyond the limits.
        """
        prompt = len(request.tokens)
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use; choose another")
        if request.status is not Status.WAITING or request.slot != -1:
            raise ValueError(f"request {request.id!r} has been scheduled before; make a new one")
        if not prompt:
            raise ValueError(f"request {request.id!r} has an empty prompt; give one token or more")
        if request.limit > self.max_model_len:
            raise ValueError(
                f"request {request.id!r} may get {request.limit} tokens long, more than "
                f"max_model_len={self.max_model_len}; lower its limit"
            )
        if prompt >= request.limit:
            raise ValueError(
                f"request {request.id!r} has {prompt} tokens, which leaves no place for a new one "
                f"within its limit of {request.limit}; shorten the prompt"
            )
        source = request.source
        if source is not None and not source.finished and source.id not in self._requests:
            raise ValueError(f"the source of request {request.id!r} is unknown; add it before")
        request.order = self._arrivals
        self._arrivals += 1
        request.timings.arrival_s = request.timings.arrival_s or self._clock()
        self._requests[request.id] = request
        if request.deadline_s is not None:
            self._deadlines.push(request.deadline_s, request)
        self._waiting.add(request)

    def abort(self, request: Request | str) -> bool:
        """Ends a request at any moment; False if it has ended or is not known."""
        if isinstance(request, str):
            known = self._requests.get(request)
            return known is not None and self.finish(known, FinishReason.ABORT)
        return self.finish(request, FinishReason.ABORT)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> bool:
        """Ends a request wherever it is, a plan that is not launched included.

        Its output so far is kept; tokens that are still in flight are not appended.

        Returns:
            False if it had ended before, or is not known.
        """
        if self._requests.get(request.id) is not request:
            return False
        del self._requests[request.id]
        place, request.status = request.status, Status.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.error = error
        request.timings.finished_s = self._clock()
        if place is Status.RUNNING:
            self._remove_running(request)
        elif request.slot >= 0:
            self._staged.remove(request)
        else:
            self._waiting.ended(request)
        if request.deadline_s is not None:
            self._deadlines.forget()
        if request.slot >= 0 or request.saved is not None:
            self.memory.release(request)
        self._waiting.orphan(request)
        self._ended.append(request)
        self._finished[reason.value] += 1
        return True

    def refuse(self, request: Request, error: str) -> None:
        """Ends a request that :meth:`add` did not take; it is told like the others."""
        request.status, request.finish_reason = Status.FINISHED, FinishReason.ERROR
        request.error = error
        request.timings.finished_s = self._clock()
        self._finished[FinishReason.ERROR.value] += 1
        self._ended.append(request)

    def restate(self, request: Request, stop: str) -> None:
        """Says of one that ended by its length that the same token completed a stop string."""
        assert request.finish_reason is FinishReason.LENGTH, request
        request.finish_reason, request.stop_reason = FinishReason.STOP, stop
        self._finished[FinishReason.LENGTH.value] -= 1
        self._finished[FinishReason.STOP.value] += 1

    def lose_all(self, error: str) -> None:
        """Fails every request, whatever state an interruption has left; the memory is not asked."""
        for request in self._requests.values():
            request.status, request.finish_reason = Status.FINISHED, FinishReason.ERROR
            request.error, request.slot, request.computed, request.saved = error, -1, 0, None
            request.in_flight = 0
            request.timings.finished_s = self._clock()
            self._finished[FinishReason.ERROR.value] += 1
            self._ended.append(request)
        self._clear()

    def abort_all(self) -> None:
        """Ends every request."""
        for request in list(self._requests.values()):
            self.abort(request)

    def take_finished(self) -> list[Request]:
        """The requests that have ended since the last call, each exactly once, in that order."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended, or has not been told by :meth:`take_finished`."""
        return bool(self._requests or self._ended)

    def stats(self) -> SchedulerStats:
        """Counts, now."""
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._requests) - len(self._running),
            steps=self._steps,
            scheduled_tokens=self._scheduled_tokens,
            preemptions=self._preemptions,
            finished=dict(self._finished),
        )

    # Places ---------------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self._running.add(request)
        if not request.timings.scheduled_s:
            request.timings.scheduled_s = self._clock()

    def _remove_running(self, request: Request) -> None:
        self._running.remove(request)
        if self._plan is not None:
            self._plan.remove(request)

    def _expire(self) -> None:
        """Ends the requests whose deadline has come."""
        while (request := self._deadlines.first()) is not None:
            if request.deadline_s is None or request.deadline_s > self._clock():
                return
            self.finish(request, FinishReason.DEADLINE)

    def check(self) -> None:
        """Verifies that each request is in one place, with the status and the slot of that place.

        Raises:
            AssertionError: an invariant does not hold.
        """
        placed = [*self._staged, *self._running]
        every = [*self._waiting, *placed]
        assert len(every) == len(self._requests), (every, self._requests)
        assert {id(r) for r in every} == {id(r) for r in self._requests.values()}
        for request in every:
            request.check()
            assert self._requests[request.id] is request, request
        self._waiting.check()
        self._running.check()
        self._deadlines.check()
        assert all(r.status is Status.WAITING for r in self._staged), self._staged
        assert all(r.finished for r in self._ended), self._ended
        assert self._staged == sorted(self._staged, key=self._order), self._staged
        assert self._running.active <= self.max_num_seqs, self._running.active
        assert len(self._launched) <= self.steps_in_flight + 1, self._launched
        flying = Counter(r for plan in self._launched for r in plan.receivers)
        assert all(r.in_flight == flying[r] for r in every), flying
        slots = [request.slot for request in placed]
        assert min(slots, default=0) >= 0, slots
        assert len(set(slots)) == len(slots), slots
        if self._plan is not None:
            self._plan.check()
            assert self._plan.tokens <= self.max_num_batched_tokens, self._plan
            assert all(r.status is Status.RUNNING for r in self._plan.requests), self._plan
