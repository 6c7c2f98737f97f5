"""The requests that run, kept in the order in which steps need them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any

from vattn.engine.policy import by_slot
from vattn.request import Request, Status


class RunningSet:
    """Requests with a slot that are computed, step by step.

    Args:
        order: of a request among them; the largest gives way first.
    """

    def __init__(self, order: Callable[[Request], Any]) -> None:
        self._order = order
        self._members: dict[str, Request] = {}  # by id
        self._decodes: list[Request] = []
        self._prefills: list[Request] = []

    @property
    def active(self) -> int:
        """How many have something to compute; the others wait for their last token."""
        return len(self._decodes) + len(self._prefills)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())

    @property
    def decodes(self) -> list[Request]:
        """Those with one token to compute, known or in flight, by slot.

        Changes make a new list. The last token of a request is not computed.
        """
        return self._decodes

    @property
    def prefills(self) -> list[Request]:
        """Those with more to compute, in order. Changes make a new list."""
        return self._prefills

    def last(self) -> Request:
        """The last in order."""
        return max(self._members.values(), key=self._order)

    def add(self, request: Request) -> None:
        """Starts a request that has a slot."""
        request.status = Status.RUNNING
        self._members[request.id] = request
        if request.uncomputed > 1:
            self._prefills = self._prefills.copy()
            insort(self._prefills, request, key=self._order)
        else:
            self._decodes = self._decodes.copy()
            insort(self._decodes, request, key=by_slot)

    def remove(self, request: Request) -> None:
        """Takes one out; its slot may be taken after that."""
        del self._members[request.id]
        self._decodes = [r for r in self._decodes if r is not request]
        if self._prefills:
            self._prefills = [r for r in self._prefills if r is not request]

    def wait_for_last(self, request: Request) -> None:
        """One that decodes has nothing more to compute: its last token is in flight."""
        self._decodes = [r for r in self._decodes if r is not request]

    def advance(self, request: Request, tokens: int) -> None:
        """Counts a chunk of a prefill as computed."""
        request.computed += tokens
        if request.uncomputed <= 1:  # it decodes from now on
            self._prefills = [r for r in self._prefills if r is not request]
            self._decodes = self._decodes.copy()
            insort(self._decodes, request, key=by_slot)

    def check(self) -> None:
        """Verifies status and lists."""
        assert all(self._members[r.id] is r for r in self), self._members
        assert all(r.status is Status.RUNNING for r in self), self._members
        waiting = {r for r in self if r.length == r.limit}
        assert {*self._decodes, *self._prefills} == set(self) - waiting, self._members
        assert self._decodes == sorted(self._decodes, key=by_slot), self._decodes
        assert all(r.uncomputed <= 1 for r in self._decodes), self._decodes
        assert all(r.uncomputed > 1 for r in self._prefills), self._prefills
        assert self._prefills == sorted(self._prefills, key=self._order), self._prefills
