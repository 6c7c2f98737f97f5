"""Beams as the scheduler sees them: requests of one group, which run together or not at all.

A group's first request, its *lead*, is scheduled like any other until the model has computed the
prompt. Then the other beams are made. They are *absent* until they have slots, which the scheduler
gives them before it gives any to those that come after their lead. Each beam computes all but its
last token, and waits at the *gate* until all others have done so; from there on they decode in the
same steps. Whatever ends or preempts one of them does so to all.
"""

from __future__ import annotations

from typing import Any

from vattn.request import Request, Status


def mates(request: Request) -> list[Request]:
    """A request, and the other beams of its group."""
    return [request] if request.group is None else list(request.group.members)


def width(request: Request) -> int:
    """How many places among those that run it takes, with the beams of its group."""
    return 1 if request.group is None else int(request.group.width)


def is_lead(request: Request) -> bool:
    """Whether it stands for itself: the first of a group of beams, or a request without one."""
    return request.group is None or request is request.group.lead


def absent(group: Any) -> list[Request]:
    """The beams that are to get a slot as soon as their lead has computed the prompt."""
    return [beam for beam in group.members[1:] if beam.slot < 0]


def is_absent(request: Request) -> bool:
    """Whether it is a beam without a slot that its lead stands for."""
    return request.slot < 0 and not is_lead(request)


def at_gate(request: Request) -> bool:
    """Whether it waits for the other beams of its group, once it has computed all but a token."""
    group = request.group
    return group is not None and group.started and bool(group.width > 1)


def gate_is_open(group: Any) -> bool:
    """Whether all beams can decode in the next step."""
    return all(
        beam.status is Status.RUNNING and beam.uncomputed == 1 and not beam.in_flight
        for beam in group.members
    )


def wanted_tokens(request: Request) -> int:
    """Tokens that it computes in chunks: all that it lacks, but for the last one of a beam."""
    return request.uncomputed - at_gate(request)
