"""A level's parts share its time: what comes last is not left with nothing."""

from __future__ import annotations

from bench.common import Budget


class Share:
    """The time until part ``index`` of ``parts`` should have ended; what was left over is in it.

    What it has no time for is among what the budget has cut.
    """

    def __init__(self, budget: Budget, index: int, parts: int) -> None:
        self._budget = budget
        seconds = budget.seconds
        self._until_s = None if seconds is None else seconds * (index + 1) / parts

    def allows(self, what: str) -> bool:
        """Whether there is time for ``what``."""
        if self._until_s is None or self._budget.spent_s < self._until_s:
            return True
        self._budget.cut.append(what)
        return False
