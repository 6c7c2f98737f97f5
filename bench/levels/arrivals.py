"""When requests arrive: a Poisson process, a burstier one, or the moments of a trace.

Moments are seconds from the beginning of a run. They are drawn before it, so that every side of a
comparison, an engine in this process or a server, is given the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Moments = npt.NDArray[np.float64]


def poisson_arrivals(
    requests: int, rate_per_s: float, *, burstiness: float = 1.0, seed: int = 0
) -> Moments:
    """Moments of so many requests, of which the last comes at ``requests / rate_per_s``.

    The gaps have a gamma distribution of shape ``burstiness``, as those of ``vllm bench serve``: 1
    is a Poisson process, smaller values come in bursts, larger ones more evenly. As there, the gaps
    are stretched to the rate asked for, which a few requests would otherwise miss by far.

    Args:
        requests: how many.
        rate_per_s: mean rate; infinite for all of them at once.
        burstiness: shape of the gaps' distribution.
        seed: the same moments for the same seed.

    Returns:
        float64, ascending.

    Raises:
        ValueError: a number that is not positive.
    """
    for name, value in (
        ("requests", requests),
        ("rate_per_s", rate_per_s),
        ("burstiness", burstiness),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")
    if math.isinf(rate_per_s):
        return np.zeros(requests)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, requests)
    moments: Moments = np.cumsum(gaps)
    moments *= requests / rate_per_s / moments[-1]
    return moments


def trace_arrivals(moments_s: Sequence[float] | Moments, factor: float = 1.0) -> Moments:
    """Moments of a trace from its first request on, and time runs ``factor`` times as fast.

    Raises:
        ValueError: no moments, some of them not ascending, or a factor that is not positive.
    """
    moments = np.asarray(moments_s, dtype=np.float64)
    if len(moments) == 0:
        raise ValueError("the trace has no requests")
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor={factor!r} must be a finite number above 0")
    gaps = np.diff(moments)
    if (gaps < 0).any():
        at = int(np.argmax(gaps < 0)) + 1
        raise ValueError(f"request {at} of the trace comes before the one in front of it")
    scaled: Moments = (moments - moments[0]) / factor
    return scaled


def mean_rate(moments: Moments) -> float:
    """Requests per second, from the first to the last.

    Raises:
        ValueError: fewer than two, or all at once.
    """
    if len(moments) < 2 or moments[-1] == moments[0]:
        raise ValueError(f"{len(moments)} requests at one moment have no rate; give more of them")
    return (len(moments) - 1) / float(moments[-1] - moments[0])
