"""Wrappers around methods of single objects, for as long as somebody watches them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

_ABSENT = object()


class Wrappers:
    """What was put before methods of objects, and how to take it away."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def add(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Has ``owner.name(...)`` call ``wrapper(the method, ...)``.

        Raises:
            AttributeError: there is no such method, or the object takes no attributes.
        """
        method = getattr(owner, name)
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, partial(wrapper, method))
        self._before.append((owner, name, before))

    def remove(self) -> None:
        """Leaves the objects as they were found."""
        while self._before:
            owner, name, before = self._before.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
