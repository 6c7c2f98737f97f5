"""A snapshot of the server for the live page; :mod:`vattn.server.live` says what is in it."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import Any

import msgspec

from vattn.async_llm import LiveRequest
from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import RECYCLED, PageRows, Stats
from vattn.kv.report import PageState
from vattn.request import Status
from vattn.server.engine_figures import Values, page_states
from vattn.server.recent import WINDOW_S, Recent
from vattn.server.request_record import LATENCIES
from vattn.server.state import ServerState

VERSION = 1
MAX_CELLS = 128
MAX_REQUESTS = 100
_RATES_OVER_S = 2.0
_FACTS = ("dtype", "device", "attention_backend", "max_model_len", "max_num_seqs")

_LETTERS = {
    PageState.UNMAPPED: ".",
    PageState.LIVE: "l",
    PageState.SHARED: "s",
    PageState.COVER: "c",
    PageState.STALE: "x",
    PageState.KEPT: "k",
}
_TO_LETTERS = bytes.maketrans(
    bytes([*_LETTERS, *(state | RECYCLED for state in _LETTERS)]),
    ("".join(_LETTERS.values()) + "".join(_LETTERS.values()).upper()).encode(),
)
_RUN = re.compile(rb"(.)\1*")

Counts = dict[str, float]


class Rates:
    """How fast counters grow, over the last two seconds of looking at them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Counts]] = deque()

    def per_second(self, now_s: float, counts: Counts) -> dict[str, float | None]:
        """Growth of each counter by the second; None at the first look, and after a long pause."""
        while self._seen and now_s - self._seen[0][0] > 2 * _RATES_OVER_S:
            self._seen.popleft()
        while len(self._seen) > 1 and now_s - self._seen[1][0] >= _RATES_OVER_S:
            self._seen.popleft()
        self._seen.append((now_s, counts))
        then_s, before = self._seen[0]
        if then_s == now_s:
            return dict.fromkeys(counts, None)
        return {
            name: max(0.0, round((count - before.get(name, 0)) / (now_s - then_s), 3))
            for name, count in counts.items()
        }


def encode(state: ServerState, rates: Rates, pages: PageRows | None) -> bytes:
    """One snapshot as JSON.

    Args:
        state: of the server.
        rates: what was seen before.
        pages: the memory map of this moment, None if there is none.
    """
    return msgspec.json.encode(make(state, rates, pages))


def make(state: ServerState, rates: Rates, pages: PageRows | None) -> dict[str, Any]:
    """One snapshot; see :func:`encode`."""
    llm, now_s = state.llm, time.monotonic()
    stats = llm.stats() if llm.is_ready else None
    live = llm.live_requests()
    totals = state.metrics.engine.totals()
    per_second = rates.per_second(now_s, _counts(state, totals))
    return {
        "version": VERSION,
        "time": round(time.time(), 3),
        "uptime_s": max(0, round(time.time() - state.created, 3)),
        "model": state.settings.served_model_names[0],
        "engine": _engine(state),
        "queue": {
            "running": stats.engine.num_running if stats else 0,
            "waiting": stats.engine.num_waiting if stats else len(live),
            "max_waiting": state.settings.max_queued_requests,
        },
        "throughput": {
            f"{name}_per_s": per_second.get(name)
            for name in ("prompt_tokens", "generation_tokens", "steps", "requests")
        },
        "latency": _latency(state, live, now_s),
        "totals": _totals(state, totals),
        "memory": _memory(stats) if stats else None,
        "driver": _driver(stats, totals, per_second) if stats else None,
        "map": _map(pages, live) if pages else None,
        "requests": [_request(request, stats, now_s) for request in live[:MAX_REQUESTS]],
        "requests_left_out": max(0, len(live) - MAX_REQUESTS),
    }


def cells(pages: bytes) -> str:
    """A row of the map as counts and letters."""
    letters = pages.translate(_TO_LETTERS)
    return "".join(f"{len(run[0])}{run[1].decode()}" for run in _RUN.finditer(letters))


def _counts(state: ServerState, totals: dict[str, Values]) -> Counts:
    """What rates are wanted of."""
    counts: Counts = {f"call {kind}": n for kind, n in totals.get("driver_calls", {}).items()}
    if totals:
        counts["steps"] = totals["engine_steps"][""]
        counts["generation_tokens"] = totals["generation_tokens"][""]
        # Those computed: one that is found in the cache takes no time.
        counts["prompt_tokens"] = totals["engine_prompt_tokens"][""]
    figures = state.metrics.requests_so_far()
    if figures is not None:
        counts["requests"] = figures.ended_count
    return counts


def _engine(state: ServerState) -> dict[str, Any]:
    llm, error = state.llm, state.llm.last_error
    if not llm.is_ready:
        name = "restarting" if error is None or error.restarting else "down"
    else:
        name = "draining" if state.draining else "up"
    try:
        facts = {fact: getattr(llm.facts, fact) for fact in _FACTS}
    except EngineDeadError:
        facts = dict.fromkeys(_FACTS, None)
    return {
        "state": name,
        "restarts": llm.restarts,
        "error": None if llm.is_ready or error is None else str(error),
        **facts,
    }


def _latency(state: ServerState, live: list[LiveRequest], now_s: float) -> dict[str, Any]:
    figures = state.metrics.requests_so_far()
    recent = figures.recent if figures else {name: Recent() for name in LATENCIES}
    also = _untold(live, now_s)
    return {name: recent[name].summary(now_s, also.get(name, ())) for name in LATENCIES}


def _untold(live: list[LiveRequest], now_s: float) -> dict[str, list[tuple[float, int]]]:
    """Latencies so far, and how many, of requests that nobody hears of before their end."""
    first: list[tuple[float, int]] = []
    between: list[tuple[float, int]] = []
    for request in live:
        since_s = now_s - request.first_token_s
        if request.is_streamed or not request.first_token_s or since_s > WINDOW_S:
            continue
        first.append((request.first_token_s - request.arrival_s, 1))
        between += [(since_s / (n - 1), n - 1) for n in request.output_tokens if n > 1]
    return {"time_to_first_token": first, "inter_token": between}


def _totals(state: ServerState, totals: dict[str, Values]) -> dict[str, float]:
    figures = state.metrics.requests_so_far()
    engine = {
        name: totals[at][""] if totals else 0
        for name, at in (
            ("prompt_tokens", "prompt_tokens"),
            ("generation_tokens", "generation_tokens"),
            ("preemptions", "num_preemptions"),
            ("prefix_cache_queries", "prefix_cache_queries"),
            ("prefix_cache_hits", "prefix_cache_hits"),
        )
    }
    return {
        "requests": figures.ended_count if figures else 0,
        **engine,
    }


def _memory(stats: Stats) -> dict[str, Any]:
    return {
        "page_bytes": stats.cache.page_bytes,
        "budget_bytes": stats.cache.budget_bytes,
        "created_bytes": stats.pool.get("created_bytes", 0),
        "peak_created_bytes": stats.pool.get("peak_created_bytes", 0),
        "token_bytes": stats.cache.token_bytes,
        "states": page_states(stats),
    }


def _driver(
    stats: Stats, totals: dict[str, Values], per_second: dict[str, float | None]
) -> dict[str, Any]:
    calls, seconds = totals["driver_calls"], totals["driver_seconds"]
    speeds = [per_second.get(f"call {kind}") for kind in calls]
    return {
        "calls": {
            kind: {
                "count": count,
                "per_s": per_second.get(f"call {kind}"),
                "seconds": round(seconds[kind], 6),
            }
            for kind, count in calls.items()
        },
        "count": sum(calls.values()),
        "per_s": None if None in speeds else round(sum(speed or 0 for speed in speeds), 3),
        "seconds": round(sum(seconds.values()), 6),
        "remaps_avoided": totals["remaps_avoided"][""],
        "bytes_returned": totals["bytes_returned"][""],
    }


def _map(pages: PageRows, live: list[LiveRequest]) -> dict[str, Any]:
    names = {request.handle: request.request_id for request in live}
    rows = [
        {
            "slot": row.slot,
            "tokens": row.tokens,
            "kept": row.kept,
            "request": names.get(row.handle),
            "sample": row.index,
            "cells": cells(row.pages),
        }
        for row in pages.rows
    ]
    return {
        "page_bytes": pages.page_bytes,
        "slots": pages.slots,
        "slot_tokens": pages.slot_tokens,
        "pages_per_cell": pages.pages_per_cell,
        "cells": max((len(row.pages) for row in pages.rows), default=0),
        "rows": rows,
    }


def _request(request: LiveRequest, stats: Stats | None, now_s: float) -> dict[str, Any]:
    samples = [row for row in (stats.requests if stats else ()) if row[0] == request.handle]
    runs = any(status == Status.RUNNING for _, _, status, _ in samples)
    first_s = request.first_token_s
    if first_s:
        # Figures are a quarter of a second old; where they have none of it, or are older than its
        # first token, that tells more.
        is_news = not samples or (stats is not None and first_s > stats.monotonic_s)
        name = "running" if runs or is_news else "waiting"
    else:
        name = "prefill" if runs else "waiting"
    return {
        "id": request.request_id,
        "state": name,
        "prompt_tokens": request.prompt_tokens,
        "max_tokens": request.max_tokens,
        "samples": request.samples,
        "output_tokens": request.output_tokens,
        "cached_tokens": request.cached_tokens,
        "age_s": round(now_s - request.arrival_s, 3),
        "time_to_first_token_s": round(first_s - request.arrival_s, 4) if first_s else None,
    }
