"""What the scheduler has to do with others: the memory it asks, the plan it makes, its counts."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from vattn.outputs import KVUsage
from vattn.request import Request

by_slot = attrgetter("slot")


class NeverFits(ValueError):
    """A request needs more pages than the budget has; the message names both."""


class Memory(Protocol):
    """What the scheduler asks of the KV cache. Each call changes everything it says, or nothing."""

    def admit(self, request: Request) -> bool | None:
        """Opens a slot with what is already there: a prefix hit, a fork, or what was swapped out.

        Promises pages for all tokens that the request has now, and sets ``slot``, ``computed``
        (less than ``len(tokens)``) and, the first time, ``cached``.

        Returns:
            False if slots or pages are short now. None if it should wait for what a running
            request computes: nobody needs to give way to it.

        Raises:
            NeverFits: the budget is too small for it, were it alone.
        """
        ...

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        """Maps the first ``tokens[i]`` tokens of each slot, all or none; False if pages are short.

        Called once per step for a slot, with its length after the step.
        """
        ...

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        """Shortens what the slot holds to the ``computed`` tokens of a running request.

        What lies beyond are drafts that were guessed wrong, or that a step has no pages for.
        ``spoiled``: their K and V may be no numbers.
        """
        ...

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        """Makes each slot what its source was before the call; False if pages are short.

        Each holds as many tokens as its source. Who owns a slot does not change; its tokens do.
        """
        ...

    def preempt(self, request: Request) -> None:
        """Takes the slot away: swaps out to ``saved``, or drops what can be computed again.

        Sets ``slot`` to -1 and ``computed`` to 0. Its pages no longer count as live on return.
        """
        ...

    def release(self, request: Request) -> None:
        """Ends a request that has a slot, or something saved; its content stays as a prefix.

        Sets ``slot`` to -1 and ``saved`` to None. A step that was launched may still use the slot.
        """
        ...

    def usage(self, request: Request) -> KVUsage:
        """What a request has of the cache now or, if it has ended, had at its end."""
        ...

    def over_budget(self) -> bool:
        """Whether more pages are live than a budget that was lowered since allows."""
        ...

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        """Begins to map ahead, in the background, what the next :meth:`grow` will ask for."""
        ...

    def shortage(self, request: Request) -> str | None:
        """Why ``request`` cannot go on, though it is alone: its pages and the budget, in words.

        One that leads a group of beams stands for all of them.

        None if somebody outside of this scheduler holds what it lacks, so that it may wait.
        """
        ...


@dataclass(slots=True, eq=False)
class Plan:
    """What one step computes.

    Args:
        decodes: requests with one token left to compute, by slot. It may still be in flight.
        chunks: of prefills, and how many tokens of each.
        verifies: requests with one token left to compute that have drafts, and how many of these
            are computed with it. All of its tokens have arrived.

    The lists over all of them have the decodes first, then the verifies, then the chunks.
    ``remove`` makes new lists, so those that somebody holds stay as they were.

    Attributes:
        slots: of each request.
        kv_lens: tokens in the slot after the step, drafts included.
        sampling: whose next token is sampled, one entry per row of logits: a request that verifies
            has a row after its last token and one after each draft.
        offsets: how many drafts come before each row; None if there are none.
        receivers: the same requests, each once.
        scored: prompts whose log probabilities are wanted: request, first position, and number of
            positions. The logits there tell of the token that follows.
    """

    decodes: list[Request]
    chunks: list[tuple[Request, int]]
    verifies: list[tuple[Request, int]] = field(default_factory=list)
    slots: list[int] = field(init=False)
    kv_lens: list[int] = field(init=False)
    sampling: list[Request] = field(init=False)
    offsets: list[int] | None = field(init=False)
    receivers: list[Request] = field(init=False)
    scored: list[tuple[Request, int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.fill()

    @property
    def tokens(self) -> int:
        """New tokens of the step, drafts included."""
        drafts = sum([1 + n for _, n in self.verifies])
        return len(self.decodes) + drafts + sum([n for _, n in self.chunks])

    @property
    def requests(self) -> list[Request]:
        """All of them: the decodes, the verifies, then those with a chunk."""
        return self.decodes + [r for r, _ in self.verifies] + [r for r, _ in self.chunks]

    @property
    def is_told(self) -> bool:
        """Whether anything of the step is told: tokens, or what the model thinks of a prompt."""
        return bool(self.sampling or self.scored)

    def fill(self) -> None:
        """Derives the lists over all from the others; before ``computed`` moves on."""
        self.slots = [r.slot for r in self.decodes]
        self.kv_lens = [r.computed + 1 for r in self.decodes]
        self.sampling = self.receivers = self.decodes
        self.offsets, self.scored = None, []
        if self.verifies:
            self._fill_verifies()
        if self.chunks:
            self.slots += [r.slot for r, _ in self.chunks]
            self.kv_lens += [r.computed + n for r, n in self.chunks]
            whole = [r for r, n in self.chunks if r.computed + n == len(r.tokens)]
            self.sampling, self.receivers = self.sampling + whole, self.receivers + whole
            if self.offsets is not None:
                self.offsets += [0] * len(whole)
            self.scored = [
                (r, first, count)
                for r, n in self.chunks
                if r.prompt_logprobs is not None
                for first, count in [to_score(r, n)]
                if count > 0
            ]

    def _fill_verifies(self) -> None:
        self.slots += [r.slot for r, _ in self.verifies]
        self.kv_lens += [r.computed + 1 + n for r, n in self.verifies]
        self.sampling = self.decodes + [r for r, n in self.verifies for _ in range(n + 1)]
        self.receivers = self.decodes + [r for r, _ in self.verifies]
        self.offsets = [0] * len(self.decodes)
        self.offsets += [offset for _, n in self.verifies for offset in range(n + 1)]

    def add(self, request: Request, tokens: int) -> None:
        """Adds one; :meth:`fill` when the last was added."""
        if request.uncomputed == 1:
            self.decodes = self.decodes.copy()
            insort(self.decodes, request, key=by_slot)
        else:
            self.chunks.append((request, tokens))

    def remove(self, request: Request) -> None:
        """Takes one out, if it is there. Its slot may be gone already."""
        self.decodes = [r for r in self.decodes if r is not request]
        self.verifies = [(r, n) for r, n in self.verifies if r is not request]
        self.chunks = [(r, n) for r, n in self.chunks if r is not request]
        self.fill()

    def check(self) -> None:
        """Verifies its lists, as long as it has not been launched."""
        assert all(r.uncomputed == 1 for r in self.decodes), self.decodes
        assert all(0 < n <= r.uncomputed for r, n in self.chunks), self.chunks
        assert all(r.uncomputed == 1 and not r.in_flight for r, _ in self.verifies), self.verifies
        assert all(0 < n <= len(r.drafts) for r, n in self.verifies), self.verifies
        assert self.decodes == sorted(self.decodes, key=by_slot), self.decodes
        assert self.slots == [r.slot for r in self.requests], self.slots
        assert len(set(self.slots)) == len(self.slots), self.slots
        assert sum(self.kv_lens) == sum([r.computed for r in self.requests]) + self.tokens
        drafts = dict(self.verifies)
        for kv_len, request in zip(self.kv_lens, self.requests, strict=True):
            assert kv_len <= request.length + drafts.get(request, 0) < request.limit + 1, request


def to_score(request: Request, tokens: int) -> tuple[int, int]:
    """Which positions of a chunk of a prompt are to be scored: the first, and how many.

    The last token of the prompt is not: what follows it is sampled. Neither are those that were,
    before the request was preempted.
    """
    assert request.prompt_logprobs is not None
    first = max(request.computed, len(request.prompt_logprobs) - 1)
    last = min(request.computed + tokens, len(request.prompt_ids) - 1)
    return first, max(0, last - first)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts of a scheduler; all but ``running`` and ``waiting`` since it was made.

    ``waiting`` includes requests that are staged for the next step, or wait for the prompt they
    share to be computed. ``scheduled_tokens`` counts those of launched steps.
    """

    running: int
    waiting: int
    steps: int
    scheduled_tokens: int
    preemptions: int
    finished: Mapping[str, int]  # by reason
