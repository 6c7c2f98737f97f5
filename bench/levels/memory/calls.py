"""Driver calls of a cache that serves a trace: while it fills, and in steady state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np

import vattn
from bench.common import Json
from bench.fake import PUBLISHED_US
from bench.levels.memory.cells import CALLS, Calls, calls_of, end_cache, make_cache, on_gpu
from bench.levels.memory.shapes import KVShape, Regions
from bench.trace import Trace
from vattn import _core

# The driver's names of what is counted; destroying pages was published by nobody.
API = {"create": "cuMemCreate", "map": "cuMemMap", "set_access": "cuMemSetAccess"}
API |= {"unmap": "cuMemUnmap"}


def modelled_us(calls: dict[str, float]) -> float:
    """What calls take at the costs that others published."""
    return sum(n * PUBLISHED_US[API[op]] for op, n in calls.items() if op in API)


@dataclass
class Phase:
    """What happened in some steps."""

    steps: int = 0
    admissions: int = 0
    tokens: int = 0
    admission: Calls = field(default_factory=lambda: dict.fromkeys(CALLS, 0))
    decode: Calls = field(default_factory=lambda: dict.fromkeys(CALLS, 0))

    def as_json(self) -> Json:
        found: Json = {"admissions": self.admissions}
        for per, calls, scale in (
            ("per_admission", self.admission, 1 / max(1, self.admissions)),
            ("per_1000_tokens", self.decode, 1000 / max(1, self.tokens)),
        ):
            each = {op: scale * calls[op] for op in API}
            found |= {f"{op}_{per}": round(n, 3) for op, n in each.items()}
            found[f"modelled_us_{per}"] = round(modelled_us(each), 1)
        return found


class Service:
    """Sequences in a cache, a token each a step; who is at its end is replaced by the next.

    When a sequence is opened the length of its prompt is known, and not that of its answer.
    """

    def __init__(self, cache: vattn.KVCache, trace: Trace, running: int) -> None:
        self.cache = cache
        self._following: Iterator[tuple[int, int]] = cycle(
            zip(trace.context.tolist(), trace.generated.tolist(), strict=True)
        )
        self._slots = np.full(running, -1, dtype=np.int32)
        self._lengths = np.zeros(running, dtype=np.int32)
        self._ends = np.zeros(running, dtype=np.int32)

    def fill(self, phase: Phase) -> None:
        """Ends whoever is done, and admits."""
        before = calls_of(self.cache.pool)
        for i in np.flatnonzero(self._lengths >= self._ends).tolist():
            if self._slots[i] >= 0:
                self.cache.release(int(self._slots[i]))
            tokens, new = next(self._following)
            slot = int(self.cache.open(expected_tokens=tokens))
            self.cache.ensure(slot, tokens)
            self._slots[i], self._lengths[i], self._ends[i] = slot, tokens, tokens + new
            phase.admissions += 1
        _add(phase.admission, before, calls_of(self.cache.pool))

    def step(self, phase: Phase) -> None:
        """One token for everybody."""
        before = calls_of(self.cache.pool)
        self._lengths += 1
        self.cache.ensure_many(self._slots, self._lengths)
        phase.steps += 1
        phase.tokens += len(self._slots)
        _add(phase.decode, before, calls_of(self.cache.pool))

    def run(self, steps: int) -> Phase:
        phase = Phase()
        for _ in range(steps):
            self.fill(phase)
            self.step(phase)
        return phase

    def end(self) -> None:
        """Gives everything back."""
        end_cache(self.cache, [slot for slot in self._slots.tolist() if slot >= 0])


def _add(into: Calls, before: Calls, after: Calls) -> None:
    for op in CALLS:
        into[op] += after[op] - before[op]


def serve(
    shape: KVShape,
    regions: Regions,
    trace: Trace,
    running: int,
    steps: int,
    device: str,
) -> list[Json]:
    """Calls cold and in steady state, without and with stale reuse.

    The first way says how much memory is needed at the peak; the second gets 1.1 times as much.
    ``running`` sequences are there at any time; ``steps`` warm up, and as many again are counted.
    """

    def way(driver: _core.Driver, reuse_stale: bool, budget: int) -> tuple[list[Json], int]:
        pool = vattn.PagePool(
            "cuda", driver=driver, page_bytes=regions.page_bytes, budget_bytes=budget
        )
        longest = int(trace.total.max())
        cache = make_cache(pool, shape, regions, running, longest, reuse_stale=reuse_stale)
        service = Service(cache, trace, running)
        cold = Phase()
        service.fill(cold)
        service.run(steps)
        steady = service.run(steps)
        peak = pool.stats().peak_created_bytes
        service.end()
        named = {"cold": cold, "steady": steady}
        return [phase.as_json() | {"phase": name} for name, phase in named.items()], peak

    most = most_bytes(shape, regions, trace, running)
    rows: list[Json] = []
    for reuse_stale in (False, True):
        found, peak = on_gpu(
            device,
            regions.page_bytes,
            partial(way, reuse_stale=reuse_stale, budget=most),
        )
        row = {"shape": shape.name, "reuse_stale": reuse_stale} | regions.as_json()
        rows += [row | phase for phase in found]
        most = int(1.1 * peak)
    return rows


def most_bytes(shape: KVShape, regions: Regions, trace: Trace, running: int) -> int:
    """More than so many sequences of the trace can take at once."""
    runs = len(shape.specs(apart=regions.apart)) * (2 * shape.kv_heads)
    longest = int(trace.total.max()) + 256  # and the largest tile
    return running * (longest * shape.token_bytes + 2 * runs * regions.page_bytes)
