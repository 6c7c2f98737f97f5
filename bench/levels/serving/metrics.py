"""What requests of a serving benchmark waited for, by the names of ``vllm bench serve``.

Made of moments alone, so that an engine in this process and a server over HTTP are measured alike.

    ttft   time to the first token
    tpot   time per output token after the first: (last - first) / (tokens - 1)
    itl    gaps between the moments at which tokens came, of all requests together
    e2el   end to end: until the last token

All count from the moment at which a request was meant to arrive, whenever it was really sent: a
side that is late is not excused from the wait that this made.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.common import Json

QUANTITIES = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")  # quantities of a request, of which goodput may have limits
PERCENTILES = (50, 90, 95, 99)
LATE_MS = 1.0  # requests sent later than this are counted
LEAST_FOR_P99 = 20  # of fewer numbers it would be little but the largest

Limits = Mapping[str, float]  # of a request, in ms, by quantity


@dataclass
class Served:
    """Moments of one request, in seconds from the beginning of the run.

    Args:
        arrival_s: when it was meant to arrive.
        prompt_tokens: of its prompt.
        sent_s: when it was handed over.
        token_s: when tokens came; tokens that came together have one moment.
        output_tokens: so far.
        cached_tokens: of the prompt, found in the cache.
        error: why it failed.
    """

    arrival_s: float
    prompt_tokens: int
    sent_s: float = math.nan
    token_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    def came(self, tokens: int, now_s: float) -> None:
        """So many tokens have come."""
        self.output_tokens += tokens
        self.token_s.append(now_s)

    @property
    def slip_s(self) -> float:
        """How much later it was sent than it was meant to arrive."""
        return self.sent_s - self.arrival_s

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """0 of a single token."""
        after = self.output_tokens - 1
        return (self.token_s[-1] - self.token_s[0]) / after if after > 0 else 0.0

    @property
    def e2el_s(self) -> float:
        return self.token_s[-1] - self.arrival_s

    def keeps(self, limits_ms: Limits) -> bool:
        """Whether it was served within all limits."""
        if self.error is not None or not self.token_s:
            return False
        found: dict[str, float] = {name: getattr(self, f"{name}_s") * 1e3 for name in LIMITED}
        return all(found[name] <= limit for name, limit in limits_ms.items())


def metrics(served: Sequence[Served], duration_s: float, limits_ms: Limits) -> Json:
    """Figures of all requests of one or more windows.

    Args:
        served: the requests, failed ones included.
        duration_s: of the windows together, each from its beginning to its last token.
        limits_ms: of ``request_goodput``; none: it is None.

    Returns:
        Counts, rates per second, and mean, std and percentiles in ms; None for what there is too
        little of.

    Raises:
        ValueError: no time passed.
    """
    if not duration_s > 0:
        raise ValueError(f"duration_s={duration_s!r} must be above 0")
    good = [s for s in served if s.error is None and s.token_s]
    inputs = sum(s.prompt_tokens for s in good)
    outputs = sum(s.output_tokens for s in good)
    kept = sum(s.keeps(limits_ms) for s in good)
    row: Json = {
        "completed": len(good),
        "failed": len(served) - len(good),
        "duration": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_tokens": sum(s.cached_tokens for s in good),
        "request_throughput": len(good) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "request_goodput": kept / duration_s if limits_ms else None,
        "schedule_slip_ms": _slip(served),
    }
    for name, values in _quantities(good).items():
        row |= summary(name, values)
    return row


def _quantities(good: Sequence[Served]) -> dict[str, list[float]]:
    """Numbers in ms, by quantity."""
    many = [s for s in good if s.output_tokens > 1]
    gaps = [1e3 * gap for s in good for gap in np.diff(s.token_s).tolist()]
    return {
        "ttft": [1e3 * s.ttft_s for s in good],
        "tpot": [1e3 * s.tpot_s for s in many],
        "itl": gaps,
        "e2el": [1e3 * s.e2el_s for s in good],
    }


def summary(name: str, values: Sequence[float]) -> Json:
    """``mean_ttft_ms``, ``median_ttft_ms``, ``std_ttft_ms``, ``p50_ttft_ms`` and so on."""
    functions: dict[str, Callable[[Sequence[float]], float]] = {
        "mean": lambda v: float(np.mean(v)),
        "median": lambda v: float(np.median(v)),
        "std": lambda v: float(np.std(v)),
    }
    row: Json = {
        f"{what}_{name}_ms": function(values) if len(values) else None
        for what, function in functions.items()
    }
    for p in PERCENTILES:
        enough = len(values) >= (LEAST_FOR_P99 if p == 99 else 1)
        row[f"p{p}_{name}_ms"] = float(np.percentile(values, p)) if enough else None
    return row


def _slip(served: Sequence[Served]) -> Json:
    """How late requests were sent, in ms: the harness has to be seen, not believed."""
    slips = [1e3 * s.slip_s for s in served if math.isfinite(s.sent_s)]
    if not slips:
        return {"median": None, "max": None, "late": 0}
    late = sum(slip > LATE_MS for slip in slips)
    return {"median": float(np.median(slips)), "max": max(slips), "late": late}


def most_at_once(served: Sequence[Served]) -> int:
    """Requests that had arrived and had not ended, at most; failed ones do not count."""
    good = [s for s in served if s.error is None and s.token_s]
    changes = [(s.arrival_s, 1) for s in good] + [(s.token_s[-1], -1) for s in good]
    # At one moment, who ends makes room for who comes.
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``["ttft:500", "tpot:50"]``, as ``vllm bench serve --goodput`` takes them: limits in ms.

    Raises:
        ValueError: a pair of another form, an unknown name, a name given twice, or a limit that is
            not a finite number above 0.
    """
    limits: dict[str, float] = {}
    for pair in pairs:
        name, colon, text = pair.partition(":")
        if not colon:
            raise ValueError(f"goodput {pair!r} is not NAME:MS, such as ttft:500")
        if name not in LIMITED:
            raise ValueError(f"goodput {pair!r}: {name!r} is not one of {', '.join(LIMITED)}")
        if name in limits:
            raise ValueError(f"goodput has two limits of {name}; give one")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not (limit > 0 and math.isfinite(limit)):
            raise ValueError(f"goodput {pair!r}: {text!r} is not a number of ms above 0")
        limits[name] = limit
    return limits


class GoodputAction(argparse.Action):
    """Keeps the pairs of ``--goodput`` as they are, after a look at them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del option_string
        try:
            parse_goodput(values)
        except ValueError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, values)
