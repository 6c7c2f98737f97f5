"""The buckets of vLLM's histograms, and a histogram that counts many equal values at once."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# fmt: off
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SAMPLES = (1, 2, 5, 10, 20)
HTTP_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)
# fmt: on


def token_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50... as far as they do not exceed ``most``."""
    found: list[int] = []
    power = 1
    while power <= most:
        found += [power * digit for digit in (1, 2, 5) if power * digit <= most]
        power *= 10
    return tuple(found)


class CountedHistogram(Collector):
    """A histogram for the path of every token.

    Prometheus' own client has no way to count a value several times, and takes a lock for each.

    Args:
        name: of the metric.
        text: what it is.
        buckets: upper bounds, ascending.
        labels: name to value, the same for all values.
    """

    def __init__(
        self, name: str, text: str, buckets: Sequence[float], labels: dict[str, str]
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(buckets)
        self._labels = labels
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` values of this size; a bound is part of its bucket."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        """The family of this moment."""
        family = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        below, buckets = 0, []
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            below += count
            buckets.append(("+Inf" if math.isinf(bound) else repr(float(bound)), below))
        family.add_metric(tuple(self._labels.values()), buckets, self._sum)
        yield family
