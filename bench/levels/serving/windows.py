"""The windows of the serving level: two engines take turns at the same arrivals."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.common import Json, Pairs
from bench.levels.arrivals import Moments
from bench.levels.open_loop import Window, serve_open_loop
from bench.levels.repeat import Repeated, repeated
from bench.levels.serving.loads import Load
from bench.levels.serving.metrics import Limits, Served, metrics, most_at_once
from bench.served import greedy, serve_all
from vattn import LLM

CANDIDATE, BASE = "contiguous", "paged"
# Of windows, base / candidate: waits in ms, and rates, of which the reciprocals are compared.
_WAITS = (
    *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms"),
    *("median_e2el_ms", "p99_e2el_ms"),
)
_RATES = ("output_throughput", "request_goodput")


def serve_window(llm: LLM, load: Load, moments: Moments, name: str) -> Window:
    """One side's turn.

    ``name`` is the salt of its prompts' K and V: nobody finds what a window before has computed of
    the same prompts, and a conversation finds its own earlier turns.
    """
    requests = [
        request
        for i, (ids, new) in enumerate(zip(load.work.prompts, load.work.new_tokens, strict=True))
        for request in llm.engine.make_requests(f"{name}/{i}", ids, greedy(new), cache_salt=name)
    ]
    gc.collect()
    return serve_open_loop(llm.engine, requests, moments)


def capacity(llm: LLM, load: Load, runs: int) -> float:
    """Requests per second of a load given all at once; the median of so many runs."""
    rates = []
    for _ in range(runs):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        serve_all(llm, load.work)
        rates.append(len(load.work) / (time.perf_counter() - start))
    llm.reset_prefix_cache()
    return statistics.median(rates)


def unloaded(llm: LLM, load: Load, requests: int, name: str) -> Json:
    """Medians of what the first requests of a load wait for when each is alone, in ms."""
    served: list[Served] = []
    for i in range(min(requests, len(load.work))):
        (request,) = llm.engine.make_requests(
            f"{name}/alone/{i}",
            load.work.prompts[i],
            greedy(load.work.new_tokens[i]),
            cache_salt=f"{name}/alone/{i}",
        )
        served += serve_open_loop(llm.engine, [request], np.zeros(1)).served
    return {
        f"median_{what}_ms": 1e3 * statistics.median(getattr(s, f"{what}_s") for s in served)
        for what in ("ttft", "tpot")
    }


@dataclass
class Turns:
    """The windows of one load at one rate, of each side."""

    windows: dict[str, list[Window]] = field(default_factory=dict)

    def add(self, side: str, window: Window) -> None:
        self.windows.setdefault(side, []).append(window)

    def row(self, side: str, limits_ms: Limits) -> Json:
        """Figures over all windows of a side."""
        windows = self.windows[side]
        served = [s for window in windows for s in window.served]
        row = metrics(served, sum(window.seconds for window in windows), limits_ms)
        most = max(most_at_once(window.served) for window in windows)
        return rounded(row | {"max_concurrent_requests": most, "windows": len(windows)})

    def ratios(self, limits_ms: Limits) -> Json:
        """Paged / contiguous of waits, contiguous / paged of rates: above 1, contiguous is better.

        Each window of one side is compared with that of the other at the same arrivals; what is
        None, or no rate at all, in one of them is left out.
        """
        each = {
            side: [metrics(w.served, w.seconds, limits_ms) for w in windows]
            for side, windows in self.windows.items()
        }
        found: Json = {}
        for name in (*_WAITS, *_RATES):
            pairs = [
                (b[name], c[name])
                for b, c in zip(each[BASE], each[CANDIDATE], strict=True)
                if b[name] and c[name]
            ]
            if pairs and len(pairs) == len(each[BASE]):
                found[name] = rounded(_ratio(pairs, is_rate=name in _RATES).as_json())
        return found

    def equal_texts(self) -> tuple[int, int]:
        """Answers of the two sides that are the same, and answers."""
        both = zip(self.windows[BASE], self.windows[CANDIDATE], strict=True)
        pairs = [p for b, c in both for p in zip(b.texts, c.texts, strict=True)]
        return sum(a == b for a, b in pairs), len(pairs)


def _ratio(pairs: Sequence[tuple[float, float]], *, is_rate: bool) -> Repeated:
    """Of (base, candidate): ms, or numbers per second, which become us for each."""
    found = []
    for base, candidate in pairs:
        base_us, candidate_us = (1e3 * base, 1e3 * candidate)
        if is_rate:
            base_us, candidate_us = 1e6 / base, 1e6 / candidate
        ratio = base_us / candidate_us
        found.append(Pairs(1, ratio, ratio, ratio, base_us, candidate_us))
    return repeated(found)


def rounded(row: Mapping[str, object]) -> Json:
    """Numbers with five digits: no measurement here is better, and files stay small."""
    return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return rounded(value)
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value
