"""The engine's step loop without a model, and the ways to map that `bench.overlap` compares."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import vattn
from bench.common import Json
from bench.fake import open_fake_driver
from bench.trace import Trace
from vattn.engine.memory import MemoryManager
from vattn.engine.scheduler import Plan, Scheduler
from vattn.kv.swap import SwapSpace
from vattn.request import Request
from vattn.sampling_params import SamplingParams


@dataclass(frozen=True)
class Way:
    """One way to run the loop."""

    name: str
    ahead: bool
    reuse_stale: bool = True
    costs: bool = True


WAYS = (
    Way("ahead", ahead=True),
    Way("sync", ahead=False),
    Way("sync fresh", ahead=False, reuse_stale=False),
    Way("free", ahead=True, costs=False),
)


@dataclass
class Times:
    """Per step, in seconds: launch to launch, and of that what the device was not busy for."""

    step_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    pages_s: list[float] = field(default_factory=list)  # of host_s: until all was mapped
    late_s: list[float] = field(default_factory=list)  # the machine's: from the deadline to us

    def as_json(self, device_s: float) -> Json:
        def quantiles(values: Sequence[float], unit: float) -> Json:
            found = np.percentile(np.array(values), [50, 90, 99, 100]) / unit
            return dict(zip(("p50", "p90", "p99", "max"), found.tolist(), strict=True))

        return {
            "steps": len(self.step_s),
            "step_over_device": quantiles(self.step_s, device_s),
            "with_pages_over_device": quantiles([device_s + s for s in self.pages_s], device_s),
            "host_us": quantiles(self.host_s, 1e-6),
            "pages_us": quantiles(self.pages_s, 1e-6),
            "late_wake_up_us": quantiles(self.late_s, 1e-6),
        }


class TimedMemory(MemoryManager):
    """The engine's memory manager, and how long it keeps the scheduler waiting between steps."""

    spent_s = 0.0

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        start = time.perf_counter()
        done = super().grow(slots, tokens)
        self.spent_s += time.perf_counter() - start
        return done

    def admit(self, request: Request) -> bool | None:
        start = time.perf_counter()
        done = super().admit(request)
        self.spent_s += time.perf_counter() - start
        return done


class Loop:
    """One engine without a model: its cache, its scheduler, and a queue that never ends.

    Args:
        way: how it maps.
        trace: requests, taken in order, over and over.
        args: sizes.
    """

    def __init__(self, way: Way, trace: Trace, args: argparse.Namespace) -> None:
        self.way = way
        self.trace = trace
        self.queued = args.queued
        self.pool = vattn.PagePool(
            "cuda",
            driver=open_fake_driver(),
            budget_bytes=args.budget,
            ahead_bytes=args.ahead_bytes if way.ahead else 0,
        )
        longest = int(trace.total.max())
        self.cache = vattn.KVCache(
            *(args.layers, 8, 128, torch.bfloat16),
            max_seqs=args.slots_per_sequence * args.running if way.reuse_stale else args.running,
            max_tokens=longest,
            pool=self.pool,
            reuse_stale=way.reuse_stale,
        )
        self.memory = TimedMemory(
            self.cache, prefix_caching=way.reuse_stale, swap=SwapSpace(0, pinned=False)
        )
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=args.running,
            max_num_batched_tokens=args.step_tokens,
            max_model_len=longest,
            stage_ahead=way.ahead,
        )
        self.added = self.ended = 0
        self._random = np.random.default_rng(0)

    def fill_queue(self) -> None:
        """New requests, as they come in while the device works."""
        waiting = self.scheduler.stats().waiting
        for _ in range(waiting, self.queued):
            i = self.added % len(self.trace)
            prompt = self._random.integers(0, 1 << 30, self.trace.context[i]).tolist()
            new_tokens = int(self.trace.generated[i])
            params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            limit = len(prompt) + new_tokens
            self.scheduler.add(Request(str(self.added), prompt, params, limit))
            self.added += 1

    def finish(self, plan: Plan) -> None:
        """What the engine does with the tokens of a step."""
        self.memory.index_prompts()
        if plan.sampling:
            self.scheduler.append_tokens(plan, [7] * len(plan.sampling))
        self.ended += len(self.scheduler.take_finished())

    def run(self, steps: int, device_s: float, times: Times | None) -> None:
        """Some steps, each of them timed if there is where to put it."""
        launched = done = time.perf_counter()
        late = 0.0
        self.fill_queue()
        for step in range(steps + 1):
            self.memory.spent_s = 0.0
            plan = self.scheduler.schedule()
            now = time.perf_counter()
            if times is not None and step:
                times.step_s.append(now - launched)
                times.host_s.append(now - done)
                times.pages_s.append(self.memory.spent_s)
                times.late_s.append(late)
            launched = now
            self.scheduler.computed(plan)
            self.scheduler.sampled(plan)
            self.scheduler.stage()
            self.fill_queue()
            late = sleep_until(launched + device_s)
            done = time.perf_counter()
            self.finish(plan)

    def settle(self) -> None:
        """Waits until nothing happens in the background."""
        if self.way.ahead:
            self.pool.mapper.drain()

    def close(self) -> None:
        """Aborts what runs and gives everything back.

        Raises:
            AssertionError: pages are left.
        """
        self.settle()
        self.scheduler.abort_all()
        self.scheduler.check()
        self.memory.check()
        self.cache.trim()
        self.settle()
        assert self.pool.stats().used_bytes == 0, self.pool.stats()
        self.cache.close()


def sleep_until(deadline: float) -> float:
    """Sleeps, and spins at the end, as who waits for a GPU does; by how much it overslept, in s."""
    rest = deadline - time.perf_counter()
    if rest > 0.0003:
        time.sleep(rest - 0.0003)
    while (now := time.perf_counter()) < deadline:
        pass
    return now - deadline


def wake_in_time() -> None:
    """Lets sleeps of this thread, and of those it starts, end when they should (Linux)."""
    set_timer_slack = 29
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_timer_slack, 1, 0, 0, 0)
