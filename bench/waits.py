"""How long calls of some methods take, step by step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.common import Json
from bench.model_args import quantiles


class Watch:
    """Adds up the time that calls of some methods take, each of them within its step.

    Only outermost calls count: what one watched method spends in another is in both figures, and
    once in the sum.
    """

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self.outer_s = 0.0
        self._depth = 0

    def add(self, owner: Any, name: str) -> None:
        """Watches a method of one object from now on."""
        method: Callable[..., Any] = getattr(owner, name)
        self.spent_s[name] = 0.0

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self._depth -= 1
                self.spent_s[name] += spent
                if not self._depth:
                    self.outer_s += spent

        setattr(owner, name, watched)

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call: of the outermost, and by name."""
        found = self.outer_s, dict(self.spent_s)
        self.outer_s, self.spent_s = 0.0, dict.fromkeys(self.spent_s, 0.0)
        return found


@dataclass
class Steps:
    """Seconds of each step."""

    step_s: list[float] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    ensure_s: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # of the driver
    ended: int = 0  # requests

    def as_json(self) -> Json:
        """Shares are of sums; the rest in microseconds."""
        total = sum(self.step_s)
        shares = [w / s for w, s in zip(self.waiting_s, self.step_s, strict=True)]
        steps = len(self.step_s)
        return {
            "steps": steps,
            "requests_ended": self.ended,
            "calls_per_step": {op: calls / steps for op, calls in self.calls.items()},
            "step_us": quantiles(self.step_s, 1e-6),
            "waiting_us": quantiles(self.waiting_s, 1e-6),
            "ensure_us": quantiles(self.ensure_s, 1e-6),
            "share_of_step": quantiles(shares),
            "waiting_share": sum(self.waiting_s) / total,
            "ensure_share": sum(self.ensure_s) / total,
        }
