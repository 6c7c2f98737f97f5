"""Requests from the moment they come until they end, and the place that each has; no torch here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from vattn.config import positive_int
from vattn.engine.gangs import absent, is_absent, is_lead, mates, width
from vattn.engine.policy import Memory, Plan, SchedulerStats
from vattn.engine.ranks import NAMES, Policy, is_policy, rank_of
from vattn.engine.running import RunningSet
from vattn.engine.waiting import RequestQueue, WaitingRoom
from vattn.request import FinishReason, Request, Status

_BY_ARRIVAL, _BY_RANK = attrgetter("order"), attrgetter("rank", "order")


class Lifecycle:
    """All requests that have not ended; what :class:`.steps.Steps` builds on.

    A request is in one of three places. *Waiting*: new or preempted, without a slot. *Staged*: has
    its slot early, for the next step; nothing has been computed since. *Running*.

    Args:
        memory: the KV cache.
        max_num_seqs: most requests that run at once.
        max_model_len: longest sequence in tokens.
        policy: who is first, see :class:`.scheduler.Scheduler`.
        steps_in_flight: launched steps whose tokens may be missing when the next is scheduled.
        clock: seconds, as of ``time.monotonic``.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_num_seqs: int,
        max_model_len: int,
        policy: Policy,
        steps_in_flight: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not is_policy(policy):
            raise ValueError(
                f"policy={policy!r} must be one of {', '.join(NAMES)}, or a function that ranks a "
                "request"
            )
        self.memory = memory
        self.max_num_seqs = positive_int(max_num_seqs, "max_num_seqs")
        self.max_model_len = positive_int(max_model_len, "max_model_len")
        self.policy = policy
        self.steps_in_flight = steps_in_flight
        self._clock = clock
        self._order = _BY_ARRIVAL if policy == "fcfs" else _BY_RANK
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
        self._barrier: Any = None  # the smallest rank that gave way in this step

    def add(self, request: Request) -> None:
        """Queues a new request. One with a ``source`` waits for the source's prompt.

        Raises:
            ValueError: an id in use, an empty prompt, lengths beyond the limits, or no rank.
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
        if width(request) > self.max_num_seqs:
            raise ValueError(
                f"beam_width={width(request)} is more than max_num_seqs={self.max_num_seqs}; lower "
                "the former or raise the latter"
            )
        source = request.source
        if source is not None and not source.finished and source.id not in self._requests:
            raise ValueError(f"the source of request {request.id!r} is unknown; add it before")
        request.timings.arrival_s = request.timings.arrival_s or self._clock()
        request.rank = self._rank_of(request)
        request.order = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        if request.deadline_s is not None:
            self._deadlines.push(request.deadline_s, request)
        self._waiting.add(request)

    def _rank_of(self, request: Request) -> Any:
        """Asked once for the samples of a prompt: all have the rank of the first, or none."""
        first = request.source
        if first is None or (first.rank is None and first.error is None):
            return rank_of(self.policy, request)
        if first.rank is None:
            raise ValueError(f"{first.id!r}, of the same prompt, was refused: {first.error}")
        return first.rank

    def knows(self, request: Request) -> bool:
        """Whether a request was added and has not ended."""
        return self._requests.get(request.id) is request

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
        """Ends a request wherever it is, a plan that is not launched included, and its group.

        Its output so far is kept; tokens that are still in flight are not appended.

        Returns:
            False if it had ended before, or is not known.
        """
        if self._requests.get(request.id) is not request:
            return False
        for each in [request, *(beam for beam in mates(request) if beam is not request)]:
            self._finish(each, reason, stop_reason, error)
        return True

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | str | None,
        error: str | None,
    ) -> None:
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
        elif not is_absent(request):
            self._waiting.ended(request)
        if request.deadline_s is not None:
            self._deadlines.forget()
        try:
            if request.slot >= 0 or request.saved is not None:
                self.memory.release(request)
        finally:  # a policy may have failed: it has ended all the same
            self._waiting.orphan(request)
            self._tell_end(request)

    def _tell_end(self, request: Request) -> None:
        """Of beams, only the lead's is told."""
        if is_lead(request):
            assert request.finish_reason is not None, request
            self._ended.append(request)
            self._finished[request.finish_reason.value] += 1

    def refuse(self, request: Request, error: str) -> None:
        """Ends a request that :meth:`add` did not take; it is told like the others."""
        request.status, request.finish_reason = Status.FINISHED, FinishReason.ERROR
        request.error = error
        request.timings.finished_s = self._clock()
        self._tell_end(request)

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
            self._tell_end(request)
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
            for each in mates(request):
                self._plan.remove(each)

    def _preempt(self, request: Request) -> None:
        """With the other beams of its group."""
        self._remove_running(request)
        for each in mates(request):
            if each.slot >= 0:
                each.preemptions += 1
                self._preemptions += 1
                self._put_back(each)

    def _put_back(self, request: Request) -> None:
        self.memory.preempt(request)
        assert request.slot == -1, request
        assert request.computed == 0, request
        request.status = Status.WAITING
        if not request.in_flight:  # else what was sampled after them is to come
            request.drafts = []
        if not is_absent(request):
            self._waiting.push(request)
        self._bar(request)

    def _bar(self, request: Request) -> None:
        """Nobody who is less urgent, or as urgent, is admitted in this step."""
        barrier = self._barrier
        self._barrier = request.rank if barrier is None else min(request.rank, barrier)

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
        leads = [r for r in every if r.group is not None and is_lead(r)]
        every += [beam for lead in leads for beam in absent(lead.group)]
        for lead in leads:
            lead.group.check()
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
            assert all(r.status is Status.RUNNING for r in self._plan.requests), self._plan
