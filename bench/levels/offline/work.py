"""The requests of the offline level: fixed contexts, a trace, long contexts, shared prefixes.

Every round has prompts of its own, so that no round finds what another has left in the prefix
cache. Lengths are the same in every round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.offline_sides import Work, make_work
from bench.trace import Trace, draw_trace, read_trace

# Of the 427 requests with which vAttention's paper measures offline throughput (arXiv articles to
# be summarized; the trace is in its artifact): prompts of 64 to 192 thousand tokens, the excess
# over the shortest falling off like an exponential with this mean, answers like a log-normal with
# this median and spread. Mean prompt / answer is about 370.
LONG_REQUESTS = 427
_SHORTEST, _LONGEST, _MEAN_EXCESS = 64_000, 193_000, 22_000
_ANSWER_MEDIAN, _ANSWER_SIGMA = 340.0, 0.82
# Of random matrices, times the root of the width: q and k are then so large that attention has
# preferences, and not so large that it sees one token only.
_GAIN = 1.6


def sharpen(model: Any) -> Any:
    """Scales random matrices, so that attention decides the next token and texts can differ."""
    wanted = _GAIN / model.config.hidden_size**0.5
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(wanted / model.config.initializer_range)
    return model


def draw_long_trace(requests: int = LONG_REQUESTS, seed: int = 0) -> Trace:
    """Lengths like those of the vAttention paper's offline experiment."""
    random = np.random.default_rng(seed)
    excess = random.exponential(_MEAN_EXCESS, requests)
    context = np.minimum(_LONGEST, _SHORTEST + excess).astype(np.int64)
    answer = random.lognormal(np.log(_ANSWER_MEDIAN), _ANSWER_SIGMA, requests)
    generated = np.maximum(1, np.rint(answer)).astype(np.int64)
    return Trace(context, generated, f"drawn like vAttention's offline trace, seed {seed}")


def open_work_trace(path: Path | None, *, long: bool, requests: int, divisor: int) -> Trace:
    """The first requests of a trace, or of a drawn one, with all lengths divided."""
    if path is not None:
        trace = read_trace(path)
    else:
        trace = draw_long_trace() if long else draw_trace()
    trace = trace.first(requests)
    return trace if divisor == 1 else trace.scaled(divisor)


def trace_works(trace: Trace, vocabulary: int, rounds: int) -> list[Work]:
    """The requests of a trace, with prompts of their own in each round."""
    lengths = trace.context.tolist(), trace.generated.tolist()
    return [make_work(*lengths, vocabulary, seed) for seed in range(rounds)]


def fixed_works(batch: int, context: int, new: int, vocabulary: int, rounds: int) -> list[Work]:
    """``batch`` prompts of ``context`` tokens each."""
    return [make_work([context] * batch, [new] * batch, vocabulary, seed) for seed in range(rounds)]


def prefix_works(
    requests: int, prefix: int, own: int, new: int, vocabulary: int, rounds: int
) -> list[Work]:
    """Requests that begin with the same tokens, as those with one system prompt do.

    Args:
        requests: of a round.
        prefix: tokens that they share; other ones in each round.
        own: tokens of each prompt behind them.
        new: tokens to generate.
        vocabulary: of the model.
        rounds: of work.
    """
    works = []
    for seed in range(rounds):
        shared, *rest = make_work([prefix] + [own] * requests, [0], vocabulary, seed).prompts
        works.append(Work([shared + tail for tail in rest], [new] * requests))
    return works
