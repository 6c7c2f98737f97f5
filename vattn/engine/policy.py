"""What the scheduler has to do with others: the memory it asks, the plan it makes, its counts."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

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

    def over_budget(self) -> bool:
        """Whether more pages are live than a budget that was lowered since allows."""
        ...

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        """Begins to map ahead, in the background, what the next :meth:`grow` will ask for."""
        ...

    def shortage(self, request: Request) -> str | None:
        """Why ``request`` cannot go on, though it is alone: its pages and the budget, in words.

        None if somebody outside of this scheduler holds what it lacks, so that it may wait.
        """
        ...


@dataclass(slots=True, eq=False)
class Plan:
    """What one step computes.

    Args:
        decodes: requests with one token left to compute, by slot. It may still be in flight.
        chunks: of prefills, and how many tokens of each.

    The lists over all of them have the decodes first, then the chunks. ``remove`` makes new lists,
    so those that somebody holds stay as they were.
    """

    decodes: list[Request]
    chunks: list[tuple[Request, int]]
    slots: list[int] = field(init=False)
    kv_lens: list[int] = field(init=False)  # tokens in the slot after the step
    sampling: list[Request] = field(init=False)  # those that get a new token

    def __post_init__(self) -> None:
        self.fill()

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return len(self.decodes) + sum([n for _, n in self.chunks])

    @property
    def requests(self) -> list[Request]:
        """All of them: the decodes, then those with a chunk."""
        return self.decodes + [r for r, _ in self.chunks]

    def fill(self) -> None:
        """Derives the lists over all from decodes and chunks; before ``computed`` moves on."""
        self.slots = [r.slot for r in self.decodes]
        self.kv_lens = [r.computed + 1 for r in self.decodes]
        self.sampling = self.decodes
        if self.chunks:
            self.slots += [r.slot for r, _ in self.chunks]
            self.kv_lens += [r.computed + n for r, n in self.chunks]
            whole = [r for r, n in self.chunks if r.computed + n == len(r.tokens)]
            self.sampling = self.decodes + whole

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
        self.chunks = [(r, n) for r, n in self.chunks if r is not request]
        self.fill()

    def check(self) -> None:
        """Verifies its lists, as long as it has not been launched."""
        assert all(r.uncomputed == 1 for r in self.decodes), self.decodes
        assert all(0 < n <= r.uncomputed for r, n in self.chunks), self.chunks
        assert self.decodes == sorted(self.decodes, key=by_slot), self.decodes
        assert self.slots == [r.slot for r in self.requests], self.slots
        assert len(set(self.slots)) == len(self.slots), self.slots
        assert sum(self.kv_lens) == sum([r.computed for r in self.requests]) + self.tokens
        assert all(n <= r.length for n, r in zip(self.kv_lens, self.requests, strict=True))


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
