"""Latencies of the last minute, for people who look now; Prometheus has histograms of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW_S = 60
_SMALLEST_S = 1e-5
_FACTOR = 1.08  # between the bounds of neighbouring buckets, so percentiles are right to 4%
_BUCKETS = 280  # the last one is for five hours and more
_PERCENTILES = (50, 90, 99)


class Recent:
    """Durations of the last minute, counted by size; the same memory for few and for many."""

    def __init__(self) -> None:
        self._total = [0] * _BUCKETS
        self._seconds: deque[tuple[int, list[int]]] = deque()  # oldest first, none twice

    def add(self, now_s: float, seconds: float, count: int = 1) -> None:
        """``count`` durations of so many seconds; ``now_s`` does not fall from call to call."""
        second = int(now_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._expire(second)
            self._seconds.append((second, [0] * _BUCKETS))
        at = _bucket(seconds)
        self._seconds[-1][1][at] += count
        self._total[at] += count

    def summary(
        self, now_s: float, also: Iterable[tuple[float, int]] = ()
    ) -> dict[str, float | int | None]:
        """How many there were in the last minute, and ``p50``, ``p90``, ``p99`` in seconds.

        Args:
            now_s: as for :meth:`add`.
            also: durations and how many, that count this time only.
        """
        self._expire(int(now_s))
        counts = self._total.copy()
        for seconds, count in also:
            counts[_bucket(seconds)] += count
        whole = sum(counts)
        found: dict[str, float | int | None] = {"count": whole}
        for percent in _PERCENTILES:
            found[f"p{percent}"] = _percentile(counts, whole, percent) if whole else None
        return found

    def _expire(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_S:
            _, counts = self._seconds.popleft()
            self._total = [all_ - old for all_, old in zip(self._total, counts, strict=True)]


def _percentile(counts: list[int], whole: int, percent: int) -> float:
    rank = math.ceil(whole * percent / 100)
    below = 0
    for at, count in enumerate(counts):
        below += count
        if below >= rank:
            return _middle(at)
    raise AssertionError(f"{whole} durations, and {below} in buckets")


def _bucket(seconds: float) -> int:
    if seconds <= _SMALLEST_S:
        return 0
    return min(1 + int(math.log(seconds / _SMALLEST_S) / math.log(_FACTOR)), _BUCKETS - 1)


def _middle(bucket: int) -> float:
    return _SMALLEST_S * _FACTOR ** (bucket - 0.5) if bucket else 0.0
