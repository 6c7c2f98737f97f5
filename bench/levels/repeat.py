"""Ratios that were measured several times, and how far these agree."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.common import Clock, Json, Pairs, measure_pairs, wall_clock

# Repeated ratios that lie closer together than this agree; a table states the spread of others.
AGREEMENT = 0.10


@dataclass(frozen=True)
class Repeated:
    """A ratio base / candidate (above 1 the candidate is faster), measured several times over.

    ``ratio`` is the median of ``repeats``, each of which is the median of neighbouring pairs.
    ``base_us`` and ``candidate_us`` are medians over all pairs.
    """

    ratio: float
    repeats: tuple[float, ...]
    base_us: float
    candidate_us: float

    @property
    def spread(self) -> float:
        """The largest minus the smallest of the repeats, over the ratio; 0 of a single one."""
        return (max(self.repeats) - min(self.repeats)) / self.ratio

    @property
    def agrees(self) -> bool:
        """Whether the repeats lie within :data:`AGREEMENT`."""
        return self.spread <= AGREEMENT

    def as_json(self) -> Json:
        return {
            "ratio": self.ratio,
            "repeats": list(self.repeats),
            "spread": self.spread,
            "agrees": self.agrees,
            "base_us": self.base_us,
            "candidate_us": self.candidate_us,
        }


def repeated(found: Sequence[Pairs]) -> Repeated:
    """Of the same comparison, made once for each of these.

    Raises:
        ValueError: there is none.
    """
    if not found:
        raise ValueError("a ratio needs at least one measurement")
    return Repeated(
        ratio=statistics.median(pairs.ratio for pairs in found),
        repeats=tuple(pairs.ratio for pairs in found),
        base_us=statistics.median(pairs.base_us for pairs in found),
        candidate_us=statistics.median(pairs.candidate_us for pairs in found),
    )


def measure_repeated(
    base: Callable[[], object],
    candidate: Callable[[], object],
    *,
    pairs: int,
    repeats: int,
    warmup: int = 2,
    clock: Clock = wall_clock,
) -> Repeated:
    """Times two functions alternately, ``repeats`` times over ``pairs`` pairs each."""
    return repeated(
        [
            measure_pairs(base, candidate, pairs=pairs, warmup=warmup if i == 0 else 0, clock=clock)
            for i in range(repeats)
        ]
    )


def cell(row: Json | None) -> str:
    """A ratio for a table, from its JSON: ``1.42``, with its range where repeats disagree."""
    if row is None:
        return "-"
    text = f"{row['ratio']:.2f}"
    if row["agrees"]:
        return text
    return f"{text} ({min(row['repeats']):.2f}-{max(row['repeats']):.2f})"
