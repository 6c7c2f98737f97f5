"""Beam search over one prompt: its beams, what each step makes of them, when it ends; no torch.

The rules are those of transformers' ``generate(num_beams=...)``, so that the sequences are the
same. Of each step's best continuations of all beams, the first ``width`` that do not end are the
beams that go on. Those that do end are *finished* if they are among the first ``width`` of all; the
best ``width`` finished ones are kept, by log probability over length to the ``length_penalty``. The
search ends when these cannot be beaten any more, in the sense that ``early_stopping`` chooses, or
at the greatest length, where every continuation ends.

Each beam is a request with a slot. A beam that goes on keeps the slot of the one it continues, or,
if another one of its siblings has that, takes one from a beam that nobody continues.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from vattn.outputs import KVUsage
from vattn.request import FinishReason, Request
from vattn.sampling_params import BeamSearchParams

Usage: TypeAlias = Callable[[Request], KVUsage]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best continuations of a group's beams, best first.

    Args:
        scores: log probability of all its new tokens, with the one that it adds.
        beams: which beam each continues, by rank.
        tokens: what it adds.
    """

    scores: Sequence[float]
    beams: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended."""

    token_ids: list[int]  # new ones
    cum_logprob: float
    score: float
    finish_reason: FinishReason
    kv: KVUsage


@dataclass(frozen=True, slots=True)
class _Next:
    """A beam of the next step."""

    parent: Request
    token: int
    score: float


def no_usage(_: Request) -> KVUsage:
    """What a request has of no cache."""
    return KVUsage()


class BeamGroup:
    """The beams of one prompt.

    A step is :meth:`choose`, then the slots move as :attr:`moves` says, then :meth:`commit`.

    Args:
        lead: the request for the prompt, which becomes the first beam.
        params: of the search.
        eos_ids: tokens that end a sequence.
    """

    def __init__(self, lead: Request, params: BeamSearchParams, eos_ids: frozenset[int]) -> None:
        self.lead = lead
        self.params = params
        self.width = params.beam_width
        self.eos_ids = eos_ids
        self.members = [lead]  # each keeps its slot
        self.ranked = [lead]  # the same, best first
        self.scores = [0.0]  # of these: log probability of their new tokens
        self.started = False  # the prompt is computed, and all members are there
        self._finished: list[Hypothesis] = []  # best first
        self._next: list[tuple[_Next, Request | None]] = []  # and whose slot it takes, best first
        lead.group = self
        lead.waits_for_tokens = True

    @property
    def candidates(self) -> int:
        """How many continuations a step needs, so that enough of them do not end."""
        return max(2, 1 + len(self.eos_ids)) * self.width

    # A step ---------------------------------------------------------------------------------------

    def choose(self, found: Candidates, usage: Usage = no_usage) -> FinishReason | None:
        """Decides over the continuations that a step has found.

        Args:
            found: :attr:`candidates` of them, or as many as there are.
            usage: what a beam has of the KV cache.

        Returns:
            Why the search has ended now, or None.
        """
        at_limit = len(self.lead.tokens) + 1 >= self.lead.limit
        going: list[_Next] = []
        for place, (score, rank, token) in enumerate(
            zip(found.scores, found.beams, found.tokens, strict=True)
        ):
            parent = self.ranked[rank]
            if token in self.eos_ids or at_limit:
                if place < self.width:
                    self._finish(parent, token, score, usage(parent))
            elif len(going) < self.width:
                going.append(_Next(parent, token, score))
        if at_limit:
            return FinishReason.LENGTH
        if not going or not self._can_improve(going[0].score):
            return FinishReason.STOP
        assert len(going) == self.width, f"{len(going)} of {len(found.tokens)} candidates go on"
        self._next = self._placed(going)
        return None

    def _finish(self, parent: Request, token: int, score: float, kv: KVUsage) -> None:
        ids = [*parent.output_ids, token]
        reason = FinishReason.STOP if token in self.eos_ids else FinishReason.LENGTH
        self._rank(Hypothesis(ids, score, self._scaled(score, len(ids)), reason, kv))

    def _rank(self, ended: Hypothesis) -> None:
        insort(self._finished, ended, key=lambda known: -known.score)
        del self._finished[self.width :]

    def _can_improve(self, best: float) -> bool:
        """Whether the beams, the best of which has this log probability, are worth going on."""
        full = len(self._finished) == self.width
        if full and self.params.early_stopping is True:
            return False
        length = len(self.lead.output_ids) + 1
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.lead.limit - len(self.lead.prompt_ids)
        if not full:
            return best > -math.inf  # else no token may follow
        return self._scaled(best, length) > self._finished[-1].score

    def _scaled(self, score: float, length: int) -> float:
        return float(score / length**self.params.length_penalty)

    def _placed(self, going: Sequence[_Next]) -> list[tuple[_Next, Request | None]]:
        """Whose slot each takes: its parent's, or one's that has no child; None for a new one."""
        first: dict[Request, _Next] = {}
        for each in going:
            first.setdefault(each.parent, each)
        childless = (beam for beam in self.members if beam not in first)
        return [
            (each, each.parent if first[each.parent] is each else next(childless, None))
            for each in going
        ]

    @property
    def moves(self) -> list[tuple[Request, Request]]:
        """Between choose and commit: beams whose slot becomes a copy of another's, and of whose."""
        return [
            (beam, each.parent)
            for each, beam in self._next
            if beam is not None and beam is not each.parent
        ]

    def commit(self) -> list[Request]:
        """Gives each beam its tokens.

        Returns:
            The beams that are new: all but the lead, the first time.
        """
        following, self._next = self._next, []
        # Those that move copy what others had, before these go on.
        moved = [
            None if beam is each.parent else [*each.parent.tokens, each.token]
            for each, beam in following
        ]
        known = len(self.members)
        self.ranked = []
        for (each, beam), ids in zip(following, moved, strict=True):
            beam = beam or self._make()
            if ids is None:
                beam.tokens.append(each.token)
            else:
                beam.tokens = ids
            self.ranked.append(beam)
        self.scores = [each.score for each, _ in following]
        self.started = True
        return self.members[known:]

    def _make(self) -> Request:
        lead, index = self.lead, len(self.members)
        beam = Request(
            id=f"{lead.id}/{index}",
            prompt_ids=lead.prompt_ids,
            params=lead.params,
            limit=lead.limit,
            index=index,
            priority=lead.priority,
            rank=lead.rank,
            cache_salt=lead.cache_salt,
            source=lead,
            group=self,
            waits_for_tokens=True,
            order=lead.order,
        )
        self.members.append(beam)
        return beam

    # What comes out -------------------------------------------------------------------------------

    def results(self) -> list[Hypothesis]:
        """Of a search that has ended: its sequences, best first.

        If it was cut short, those that go on are among them, with the reason why they do not.
        """
        reason = self.lead.finish_reason
        assert reason is not None, "the search has not ended"
        if reason is FinishReason.ERROR:
            return []
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            for beam, score in zip(self.ranked, self.scores, strict=True):
                if ids := beam.output_ids:
                    scaled = self._scaled(score, len(ids))
                    self._rank(Hypothesis(ids, score, scaled, reason, beam.kv or KVUsage()))
        return self._finished

    def check(self) -> None:
        """Verifies what its beams have in common.

        Raises:
            AssertionError: an invariant does not hold.
        """
        beams = self.members
        assert beams[0] is self.lead, self.lead
        assert len(beams) == (self.width if self.started else 1), beams
        assert all(beam.group is self and beam.waits_for_tokens for beam in beams), beams
        assert sorted(map(id, self.ranked)) == sorted(map(id, beams)), beams
        assert len({len(beam.tokens) for beam in beams}) == 1, beams
        assert len({(beam.order, beam.rank, beam.cache_salt) for beam in beams}) == 1, beams
        assert self.scores == sorted(self.scores, reverse=True), self.scores
        scores = [ended.score for ended in self._finished]
        assert scores == sorted(scores, reverse=True), scores
        assert len(scores) <= self.width, scores


def check_search(params: BeamSearchParams, new_tokens: int) -> None:
    """Refuses a length penalty for which scores are no numbers.

    Args:
        params: of the search.
        new_tokens: most of them.

    Raises:
        ValueError: it is too far from 0 for sequences of that length.
    """
    exponent = params.length_penalty * math.log10(new_tokens)
    if abs(exponent) > 300:
        raise ValueError(
            f"length_penalty={params.length_penalty:g} makes scores of {new_tokens} tokens too "
            "large or too small for a number; bring it closer to 0"
        )
