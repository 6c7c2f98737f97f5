"""The requests that run, kept in the order in which steps need them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vattn.engine.gangs import at_gate, gate_is_open, mates, width
from vattn.engine.policy import by_slot
from vattn.request import Request, Status


class RunningSet:
    """Requests with a slot that are computed, step by step.

    Some of them are *held*: those that wait for the token that is in flight, and beams that wait
    for the others of their group, see :mod:`vattn.engine.gangs`.

    Args:
        order: of a request among them; the largest gives way first.
    """

    def __init__(self, order: Callable[[Request], Any]) -> None:
        self._order = order
        self._members: dict[str, Request] = {}  # by id
        self._decodes: list[Request] = []
        self._prefills: list[Request] = []
        self._held: dict[str, Request] = {}  # by id
        self._leads: dict[str, Request] = {}  # of the groups of beams, by id
        self._places = 0  # that those take, or will take, beside the beams that run

    @property
    def active(self) -> int:
        """Places that are taken: by all but those that only wait for their last token.

        A group of beams takes as many as it is wide, though some of them may not be there yet.
        """
        return len(self._decodes) + len(self._prefills) + len(self._held) + self._places

    @property
    def decoding(self) -> int:
        """Those that take a token of a step: that decode, and that are held and will."""
        return len(self._decodes) + len(self._held)

    @property
    def expected(self) -> list[Request]:
        """Those that are held until their token has arrived, and then decode."""
        return [r for r in self._held.values() if r.in_flight and r.length < r.limit]

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

    @property
    def leads(self) -> list[Request]:
        """The first beams of the groups that run, in order."""
        return sorted(self._leads.values(), key=self._order) if self._leads else []

    def last(self) -> Request:
        """The last in order."""
        return max(self._members.values(), key=self._order)

    def is_alone(self, request: Request) -> bool:
        """Whether nobody runs beside one that does, but for the beams of its group."""
        return sum(self._members.get(r.id) is r for r in mates(request)) == len(self)

    def add(self, request: Request) -> None:
        """Starts a request that has a slot. The first beam of a group comes before the others."""
        request.status = Status.RUNNING
        self._members[request.id] = request
        if request.group is not None:
            self._places -= 1
            if request is request.group.lead:
                self._leads[request.id] = request
                self._places += width(request)
        if request.uncomputed > 1:
            self._prefills = self._prefills.copy()
            insort(self._prefills, request, key=self._order)
        else:
            self._decode([request])

    def remove(self, request: Request) -> None:
        """Takes one out, and the beams with it; their slots may be taken after that."""
        gone = [r for r in mates(request) if self._members.pop(r.id, None) is not None]
        self._hide(gone)
        if self._prefills:
            self._prefills = [r for r in self._prefills if r not in gone]
        if request.group is not None and self._leads.pop(request.group.lead.id, None) is not None:
            self._places -= width(request) - len(gone)

    def wait_for_last(self, request: Request) -> None:
        """One that decodes has nothing more to compute: its last token is in flight."""
        self._decodes = [r for r in self._decodes if r is not request]

    def pause(self, requests: Sequence[Request]) -> None:
        """Holds some that decode until their tokens have arrived, though these may be the last."""
        waiting = [r for r in requests if self._members.get(r.id) is r]
        self._hide(waiting)
        self._held.update((r.id, r) for r in waiting)

    def resume(self, requests: Sequence[Request]) -> None:
        """The tokens of some that were held have arrived; those that run no more are passed."""
        waiting = [r for r in requests if self._held.get(r.id) is r]
        for request in waiting:
            del self._held[request.id]
        self._decode(waiting)

    def advance(self, request: Request, tokens: int) -> None:
        """Counts a chunk of a prefill as computed."""
        request.computed += tokens
        if request.uncomputed <= 1:  # it decodes from now on
            self._prefills = [r for r in self._prefills if r is not request]
            self._decode([request])

    def _decode(self, requests: Sequence[Request]) -> None:
        """They have one token to compute. Beams are held until all of their group are so far."""
        ready = [r for r in requests if not at_gate(r)]
        arrived = {r.group.lead.id: r.group for r in requests if at_gate(r)}
        self._held.update((r.id, r) for r in requests if at_gate(r))
        for group in arrived.values():
            if gate_is_open(group):
                for beam in group.members:
                    del self._held[beam.id]
                ready += group.members
        if len(ready) == 1:
            self._decodes = self._decodes.copy()
            insort(self._decodes, ready[0], key=by_slot)
        elif ready:
            self._decodes = sorted(self._decodes + ready, key=by_slot)

    def _hide(self, requests: Sequence[Request]) -> None:
        hidden = set(requests)
        self._decodes = [r for r in self._decodes if r not in hidden]
        for request in requests:
            self._held.pop(request.id, None)

    def check(self) -> None:
        """Verifies status, lists and places."""
        assert all(self._members[r.id] is r for r in self), self._members
        assert all(r.status is Status.RUNNING for r in self), self._members
        lists = [*self._decodes, *self._prefills, *self._held.values()]
        waiting = {r for r in self if r.length == r.limit and r.id not in self._held}
        assert len(lists) == len(set(lists)), self._members
        assert set(lists) == set(self) - waiting, self._members
        assert self._decodes == sorted(self._decodes, key=by_slot), self._decodes
        assert all(r.uncomputed <= 1 for r in self._decodes), self._decodes
        assert all(r.uncomputed > 1 for r in self._prefills), self._prefills
        assert self._prefills == sorted(self._prefills, key=self._order), self._prefills
        assert not any(r.waits_for_tokens and r.in_flight for r in self._decodes), self._decodes
        for request in self._held.values():
            waits = request.waits_for_tokens and request.in_flight > 0
            assert waits or (at_gate(request) and not gate_is_open(request.group)), request
        self._check_groups()

    def _check_groups(self) -> None:
        beams = [r for r in self if r.group is not None]
        assert {r.group.lead.id for r in beams} == set(self._leads), self._leads
        assert self._places == sum(map(width, self._leads.values())) - len(beams), self._leads
        for lead in self._leads.values():
            decoding = [r for r in lead.group.members if r in self._decodes]
            assert len(decoding) in (0, len(lead.group.members)), decoding
