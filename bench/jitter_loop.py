"""Steps of a decode loop over slots, and requests that come and go in other slots meanwhile."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bench.common import Json, wall_clock
from bench.device import device_clock
from bench.graph_clock import capture
from bench.kernels import Kernel, Prepare
from bench.layout_fill import TOLERANCE, fill, relative_error
from bench.problem import Attend, Problem, reference
from bench.trace import Lengths
from vattn import KVCache, _core

cuda: Any = torch.cuda  # parts of it are untyped


@dataclass(frozen=True)
class Way:
    """What happens beside the steps: so many times the trace's tokens, mapped ahead or between."""

    name: str
    rate: float
    ahead: bool = True


WAYS = (
    Way("nothing", 0),
    Way("trace", 1),
    Way("trace x10", 10),
    Way("trace, mapped between steps", 1, ahead=False),
)


@dataclass
class Times:
    """Of every step, in seconds."""

    device_s: list[float] = field(default_factory=list)  # the attention alone
    step_s: list[float] = field(default_factory=list)  # from launch to launch
    pages_s: list[float] = field(default_factory=list)  # of that, until the next pages were mapped

    def extend(self, others: Times) -> None:
        """More steps of the same way."""
        self.device_s += others.device_s
        self.step_s += others.step_s
        self.pages_s += others.pages_s

    def as_json(self) -> Json:
        def quantiles(values: Sequence[float]) -> Json:
            found = np.percentile(np.array(values) * 1e6, [50, 90, 99, 100]).tolist()
            return dict(zip(("p50", "p90", "p99", "max"), found, strict=True))

        return {
            "steps": len(self.step_s),
            "device_us": quantiles(self.device_s),
            "step_us": quantiles(self.step_s),
            "pages_us": quantiles(self.pages_s),
            "pages_share": sum(self.pages_s) / sum(self.step_s),
        }


class Work:
    """The device's part of a step: attention of ``batch`` sequences, all layers, over and over.

    On a GPU one CUDA graph; on a CPU calls that run while they are waited for.

    Args:
        cache: its first ``batch`` slots are opened here.
        kernel, prepare: as ``bench.kernels.load_kernels`` gives them.
        batch: sequences.
        length: tokens of each.
        heads: query heads.
        step_s: about how long a step takes.
    """

    def __init__(
        self,
        cache: KVCache,
        kernel: Kernel,
        prepare: Prepare,
        batch: int,
        length: int,
        heads: int,
        step_s: float,
    ) -> None:
        self.kernel = kernel
        self._on_gpu = cache.device.type == "cuda"
        self._dtype = cache.specs[0].dtype
        slots = [int(cache.open(slot=slot)) for slot in range(batch)]
        cache.ensure_many(slots, [length] * batch)
        shape = (batch, 1, heads, cache.specs[0].head_dim)
        q = torch.randn(shape, dtype=self._dtype, device=cache.device)
        self._problem = Problem(q, slots, [length] * batch)
        self._layers = [cache.layer(layer) for layer in range(len(cache.specs))]
        for layer, (k, v) in enumerate(self._layers):
            fill(cache, layer, [length] * batch, k, v)
        calls = [prepare(self._problem, k, v) for k, v in self._layers]
        self._first = calls[0]
        self.rounds = max(1, round(step_s / self._seconds(calls)))
        self._calls = calls * self.rounds
        self._replay = capture(self._calls) if self._on_gpu else None
        self._events = [cuda.Event(enable_timing=True) for _ in range(2 if self._on_gpu else 0)]

    def launch(self) -> None:
        """Starts a step."""
        if self._replay is not None:
            self._events[0].record()
            self._replay()
            self._events[1].record()

    def wait(self) -> float:
        """Returns at the end of the step that was launched last; the device's seconds of it."""
        if self._replay is None:
            return wall_clock(lambda: _run(self._calls))
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) * 1e-3

    def check(self) -> float:
        """Relative error of the first layer against float32: others' pages were not ours.

        Raises:
            AssertionError: beyond the tolerance of the dtype.
        """
        error = relative_error(self._first(), reference(self._problem, *self._layers[0]))
        if not error < TOLERANCE[self._dtype]:
            raise AssertionError(f"{self.kernel.label}: relative error {error:.2g} after the steps")
        return error

    def _seconds(self, calls: Sequence[Attend]) -> float:
        """Of all calls once."""
        run = capture(calls) if self._on_gpu else lambda: _run(calls)
        clock = device_clock if self._on_gpu else wall_clock
        return min(clock(run) for _ in range(3))


class Traffic:
    """Requests that grow by a number of tokens a step altogether, end, and are followed by others.

    They take the slots in turn and end mapped, as in the engine; the budget holds a fraction of
    what the slots could keep, so each needs pages that must be unmapped elsewhere first.

    Args:
        cache: whose other slots are in use.
        slots: that requests take in turn.
        lengths: of the requests, taken in order, over and over.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Lengths) -> None:
        self._cache = cache
        self._slots = itertools.cycle(slots)
        self._lengths: Iterator[int] = itertools.cycle(lengths.tolist())
        self._open: tuple[int, int, int] | None = None  # slot, tokens, length
        self._ended: list[int] = []
        self._wanted: tuple[list[int], list[int]] = ([], [])
        self._ticket: _core.Ticket | None = None
        self._owed = 0.0
        self.requests = 0

    def ahead(self, tokens: float, *, mapped: bool) -> None:
        """While the device works: ends requests, and says what the next step needs.

        Args:
            tokens: of all requests in the next step.
            mapped: maps them in the background, too.
        """
        for slot in self._ended:
            self._cache.release(slot)
        self._ended.clear()
        self._owed += tokens
        slots, lengths = self._wanted = ([], [])
        while self._owed >= 1:
            slot, have, length = self._open or self._next()
            grown = min(length, have + int(self._owed))
            self._owed -= grown - have
            slots.append(slot)
            lengths.append(grown)
            if grown == length:
                self._ended.append(slot)
                self._open = None
            else:
                self._open = (slot, grown, length)
        if mapped and slots:
            self._ticket = self._cache.prepare(slots, lengths)

    def commit(self) -> None:
        """Between two steps: returns when what the next one needs is mapped."""
        if self._ticket is not None:
            self._ticket.wait()
            self._ticket = None
        slots, lengths = self._wanted
        if slots:
            self._cache.ensure_many(slots, lengths)
        self._wanted = ([], [])

    def settle(self) -> None:
        """Ends every request and waits until nothing happens in the background."""
        self.commit()
        if self._open is not None:
            self._ended.append(self._open[0])
            self._open = None
        self._owed = 0.0
        self.ahead(0, mapped=False)
        self._cache.pool.mapper.drain()

    def _next(self) -> tuple[int, int, int]:
        self.requests += 1
        slot = int(self._cache.open(slot=next(self._slots)))
        return slot, 0, next(self._lengths)


def run_steps(work: Work, traffic: Traffic, tokens: float, ahead: bool, steps: int) -> Times:
    """So many steps with ``tokens`` tokens of traffic in each, after one that is not counted."""
    times = Times()
    for step in range(steps + 1):
        launched = time.perf_counter()
        work.launch()
        traffic.ahead(tokens, mapped=ahead)
        device_s = work.wait()
        waiting = time.perf_counter()
        traffic.commit()
        ready = time.perf_counter()  # the next step can be launched
        if step > 0:
            times.device_s.append(device_s)
            times.step_s.append(ready - launched)
            times.pages_s.append(ready - waiting)
    traffic.settle()
    return times


def _run(calls: Sequence[Attend]) -> None:
    for call in calls:
        call()
