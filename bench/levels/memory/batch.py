"""How many requests of a trace are in a batch at once before the memory is full.

Requests are admitted in the order of the trace, each at its full length, until the first does not
fit. That is the real admission: ``KVCache.admission_pages`` against the pages of the pool, and the
paged manager's own. The formula, which has to agree with it, says the same of other stretches of
the trace.
"""

from __future__ import annotations

import statistics

import numpy as np

import vattn
from bench.common import Json
from bench.levels.memory.cells import end_cache, fits, make_cache, on_gpu
from bench.levels.memory.shapes import KVShape, Regions
from bench.trace import Lengths, Trace
from bench.waste import pages_each
from vattn import _core


def until_full(sizes: Lengths, room: int) -> int:
    """How many, from the first on, are together no more than ``room``."""
    return int(np.searchsorted(np.cumsum(sizes), room, side="right"))


def starts(requests: int, stretches: int) -> list[int]:
    """Where stretches of a trace begin, evenly."""
    return [requests * i // stretches for i in range(stretches)]


def beginning_at(lengths: Lengths, start: int) -> Lengths:
    """The trace from there on, and then from its beginning."""
    return np.roll(lengths, -start)


def spread_row(counts: list[int]) -> Json:
    """Of all stretches; the first of them is the one that is measured."""
    return {
        "requests": round(statistics.median(counts)),
        "first": counts[0],
        "low": min(counts),
        "high": max(counts),
    }


def most_in_regions(
    shape: KVShape,
    regions: Regions,
    trace: Trace,
    budget_bytes: int,
    max_tokens: int,
    stretches: int,
    device: str,
) -> Json:
    """Requests in a KVCache of that budget.

    Raises:
        AssertionError: admission and formula disagree, or pages are left.
    """
    layout = regions.layout(shape, max_tokens, "cuda")
    needs = pages_each(layout.regions, regions.page_bytes, layout.tiles, trace.total)
    room = budget_bytes // regions.page_bytes
    counts = [until_full(beginning_at(needs, s), room) for s in starts(len(trace), stretches)]
    how = "computed"
    if fits(device, regions.page_bytes, budget_bytes):
        how = "measured"
        found = on_gpu(
            device,
            regions.page_bytes,
            lambda driver: _admit(shape, regions, trace, budget_bytes, max_tokens, driver),
        )
        assert found == counts[0], f"{shape.name}, {regions}: {found}, by formula {counts[0]}"
    return {"shape": shape.name, "how": how} | regions.as_json() | spread_row(counts)


def _admit(
    shape: KVShape,
    regions: Regions,
    trace: Trace,
    budget_bytes: int,
    max_tokens: int,
    driver: _core.Driver,
) -> int:
    pool = vattn.PagePool(
        "cuda", driver=driver, page_bytes=regions.page_bytes, budget_bytes=budget_bytes
    )
    # Tokens alone, without any waste, cannot be more.
    most = until_full(trace.total * shape.token_bytes, budget_bytes) + 1
    cache = make_cache(pool, shape, regions, most, max_tokens)
    slots: list[int] = []
    for tokens in trace.total.tolist():
        if cache.admission_pages(tokens) > pool.core.available_pages():
            break
        slot = int(cache.open(expected_tokens=tokens))
        cache.ensure(slot, tokens)
        slots.append(slot)
    end_cache(cache, slots)
    return len(slots)


def most_whole_slots(shape: KVShape, budget_bytes: int, max_tokens: int) -> Json:
    """Requests if each has the longest sequence's memory from the beginning."""
    n = budget_bytes // (max_tokens * shape.token_bytes)
    row = {"shape": shape.name, "how": "computed", "layout": "preallocated"}
    return row | spread_row([n])
