"""Who comes first: the scheduling policies, a function of the user's among them; no torch here.

A prompt has its rank from the moment its first request is added, and keeps it: the smallest comes
first, and of equal ones who came first. Under every policy but first come, first served, a waiting
request takes the place of running ones of a larger rank when sequences or pages are short.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from vattn.request import Request

Rank: TypeAlias = int | float | tuple[int | float, ...]
RankFunction: TypeAlias = Callable[[Request], Rank]
Policy: TypeAlias = Literal["fcfs", "priority"] | RankFunction

NAMES = ("fcfs", "priority")


def is_policy(policy: object) -> bool:
    """Whether it is the name of one, or could be a function that ranks; a class could not."""
    if isinstance(policy, str):
        return policy in NAMES
    return callable(policy) and not isinstance(policy, type)


def rank_of(policy: Policy, request: Request) -> Any:
    """The rank of a new request; all those of one policy can be compared with each other.

    Raises:
        ValueError: the function failed, or what it returned is no rank; says which function.
    """
    if policy == "fcfs":
        return 0
    if policy == "priority":
        return request.priority
    assert not isinstance(policy, str), policy
    name = getattr(policy, "__qualname__", None) or repr(policy)
    try:
        rank = policy(request)
    except Exception as error:
        raise ValueError(
            f"scheduling_policy={name} failed for this request: {type(error).__name__}: {error}"
        ) from error
    parts = tuple(map(_number, rank if isinstance(rank, tuple) else (rank,)))
    if not parts or None in parts:
        raise ValueError(
            f"scheduling_policy={name} returned {rank!r} for this request; a rank is a number, or "
            "a tuple of numbers, and the smallest comes first"
        )
    return parts


def _number(value: object) -> int | float | None:
    """As Python's own, of which all compare, whatever their size; None if it is no number."""
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # a fraction, say
        return None
    return None if math.isnan(number) else number
