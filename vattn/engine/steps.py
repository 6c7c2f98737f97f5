"""What a step does to its requests: tokens computed, sampled, arrived, verified; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vattn.engine.beams import BeamGroup, Candidates
from vattn.engine.lifecycle import Lifecycle
from vattn.engine.policy import Plan
from vattn.engine.speculation.counts import DraftCounts
from vattn.request import FinishReason, Request, Status

NO_TOKEN = (
    "no token can be sampled: the model's logits are not finite (check its weights and dtype), or "
    "what it was asked (min_tokens, allowed_token_ids, bad_words, ...) excludes every token"
)


class Steps(Lifecycle):
    """The progress of requests; what :class:`.scheduler.Scheduler` builds on.

    Args:
        settings: of :class:`.lifecycle.Lifecycle`.

    Attributes:
        drafts: how well they were guessed.
        read_text: given a request with a new token, why its text ends with that, and the stop
            string or error; None if it goes on. Asked where the next token may be known already.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.drafts = DraftCounts()
        self.read_text: Callable[[Request], tuple[FinishReason, str] | None] | None = None

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
        if waiting := [r for r in plan.receivers if r.waits_for_tokens]:
            self._running.pause(waiting)
        self._launched.append(plan)

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
        if waiting := [r for r in plan.receivers if r.waits_for_tokens and r.group is None]:
            self._running.resume(waiting)
        return appended

    def _append(self, request: Request, token: int, now: float) -> None:
        """One more token; it may be the last. A beam gets its own by :meth:`advance_beams`."""
        timings = request.timings
        timings.last_token_s = now
        if not timings.first_token_s:
            timings.first_token_s = now
        if request.group is not None:
            return
        known = request.tokens
        known.append(token)
        if token in request.stop_ids or len(known) >= request.limit:
            self._stop(request, token)

    def _append_verified(self, request: Request, tokens: Sequence[int], now: float) -> int:
        """The drafts that were guessed right, and the token after them; how many these are."""
        drafts, request.drafts = request.drafts[: len(tokens) - 1], []
        is_spoiled = min(tokens) < 0
        if is_spoiled:
            # Kernels multiply by zero what they mask: a draft whose K and V are no numbers spoils
            # the tokens before it, too. What is right shows when they are computed without it.
            request.never_drafts = True
            tokens = tokens[: tokens.index(-1)]
        right = 0
        while right < len(tokens) - 1 and tokens[right] == drafts[right]:
            right += 1
        if request.slot >= 0 and is_spoiled:  # before it may end, and be kept
            known = request.computed - (not tokens)
            request.computed = known + right
            self.memory.cut(request, spoiled=True)
            request.computed = known
        before = len(request.tokens)
        for number, token in enumerate(tokens[: right + 1]):
            if number and request.slot >= 0:
                request.computed += 1  # the draft before this token was right
            self._append(request, token, now)
            if not request.finished and request.params.stop_strings:
                self._stop_by_text(request)
            if request.finished:
                break
        if request.slot >= 0:
            self.memory.cut(request)
        appended = len(request.tokens) - before
        self.drafts.count(len(drafts), min(right, appended))
        return appended

    def _stop(self, request: Request, token: int) -> None:
        """Ends a request whose last token may be the last; as vLLM, without reason for EOS."""
        outputs = len(request.tokens) - len(request.prompt_ids)
        if token in request.stop_ids and outputs >= request.params.min_tokens:
            reason = token if token in request.params.stop_ids else None
            self.finish(request, FinishReason.STOP, stop_reason=reason)
        elif len(request.tokens) >= request.limit:
            self.finish(request, FinishReason.LENGTH)

    def _stop_by_text(self, request: Request) -> None:
        """Ends a request whose last token completes a stop string: the next one must not come."""
        if self.read_text is not None and (found := self.read_text(request)) is not None:
            reason, text = found
            is_stop = reason is FinishReason.STOP
            self.finish(
                request,
                reason,
                stop_reason=text if is_stop else None,
                error=None if is_stop else text,
            )

    def advance_beams(self, found: Sequence[tuple[BeamGroup, Candidates]]) -> None:
        """Decides what groups of beams go on with, after :meth:`append_tokens` of their step.

        Args:
            found: the groups, and what they can go on with. Those that have ended are passed over.
        """
        going: list[BeamGroup] = []
        for group, candidates in found:
            if group.lead.finished:
                continue
            reason = group.choose(candidates, self.memory.usage)
            if reason is not None:
                self.finish(group.lead, reason)
            else:
                going.append(group)
        if not self._move(going):  # pages are short for some of them
            for group in going:
                if not self._move([group]):
                    self._preempt(group.lead)
        for group in going:
            self._requests.update((beam.id, beam) for beam in group.commit())
            self._running.resume(group.members)

    def _move(self, groups: Sequence[BeamGroup]) -> bool:
        """Moves what the beams have computed to where they go on; False if pages are short."""
        moves = [(to.slot, at.slot) for group in groups for to, at in group.moves if to.slot >= 0]
        return not moves or self.memory.reorder([to for to, _ in moves], [at for _, at in moves])

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
