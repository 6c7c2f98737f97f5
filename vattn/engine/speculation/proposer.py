"""What makes drafts, as the engine and the memory manager see it; no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vattn.request import Request


class Proposer(Protocol):
    """Guesses the next tokens of requests, and keeps something of its own beside each.

    What it keeps in the pages of the KV cache's pool is held for as long as nobody needs it: the
    sequences that are served go first.
    """

    @property
    def fixed_pages(self) -> int:
        """Pages of the pool that it has for as long as it lives."""
        ...

    def propose(self, requests: Sequence[Request]) -> None:
        """Sets the ``drafts`` of each request that it has a guess for.

        Args:
            requests: that :func:`may_draft` lets through and whose tokens have all arrived; their
                ``drafts`` are empty.
        """
        ...

    def let_go(self, request: Request) -> None:
        """Drops what is kept beside a request that has ended or given way, if anything is."""
        ...

    def relieve(self) -> bool:
        """Gives up pages, of one sequence; False if there are none to give up."""
        ...

    def live_pages(self) -> int:
        """Pages of the pool that :meth:`relieve` can give up, all in all."""
        ...

    def held_bytes(self) -> int:
        """What it has of the pool, mapped pages that nobody uses included."""
        ...

    def lose_all(self) -> None:
        """Drops everything, whatever state an interruption has left."""
        ...

    def close(self) -> None:
        """Ends its use; steps that were launched may still run."""
        ...

    def check(self) -> None:
        """Verifies its invariants.

        Raises:
            AssertionError: one is broken, which is a bug of vattn.
        """
        ...


def may_draft(request: Request) -> bool:
    """Whether drafts of a request can be verified, and would save a step.

    Not where the logits at a position depend on the tokens before it by more than the model:
    penalties, bad words, structured outputs, stop tokens ruled out for a while, and beams. Nor
    where drafts have spoiled a step.
    """
    outputs = len(request.tokens) - len(request.prompt_ids)
    return (
        not (request.needs_tokens or request.never_drafts)
        and request.grammar is None
        and request.group is None
        and request.uncomputed == 1
        and not request.in_flight
        and outputs >= request.params.min_tokens
        and most_drafts(request) > 0
    )


def most_drafts(request: Request) -> int:
    """How many drafts a request has a use for: one token of its limit is sampled in any case."""
    return request.limit - len(request.tokens) - 1
