"""What the scheduler costs per step, on a stub of the model: 256 running sequences by default.

    python -m bench.scheduler                     # stub memory, a KVCache, and the whole engine
    python -m bench.scheduler --memory stub --steps 2000

Two loads: ``steady``, where every sequence decodes in every step, and ``churn``, where each new
request gets an output length of its own, so that some end and others are admitted in most steps.
Parts of a step: ``schedule`` (with the memory's ``grow``), ``computed``, ``stage`` (with the
memory's ``prepare``), ``append`` (tokens, stop checks, releases) and ``ended``. The KVCache has its
pages mapped already, as they are when the mapper was ahead of the step, so ``grow`` is
``ensure_many`` with nothing to map. ``engine`` times ``Engine.step()`` as a whole, with everything
but a model: the real memory manager, packing, sampling and outputs, and pages mapped on the way.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from bench.common import Json, Target, parser, print_table, print_targets, report, write_json
from bench.engine_step import step_times
from vattn import KVCache
from vattn.engine.scheduler import Scheduler
from vattn.outputs import KVUsage
from vattn.request import Request
from vattn.sampling_params import SamplingParams

PARTS = ("schedule", "computed", "stage", "append", "ended")
PROMPT_TOKENS = 32
LOADS = ("steady", "churn")
MEMORIES = ("stub", "cache", "engine")
TARGET_US = 500.0
_WARMUP_STEPS = 20


class StubMemory:
    """Always has a slot and pages."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))[::-1]

    def admit(self, request: Request) -> bool:
        if not self._free:
            return False
        request.slot, request.computed = self._free.pop(), 0
        return True

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        return True

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        pass

    def preempt(self, request: Request) -> None:
        self.release(request)
        request.computed = 0

    def release(self, request: Request) -> None:
        self._free.append(request.slot)
        request.slot = -1

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        raise AssertionError("a stub has no beams")

    def usage(self, request: Request) -> KVUsage:
        return KVUsage()

    def over_budget(self) -> bool:
        return False

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        pass

    def shortage(self, request: Request) -> str:
        raise AssertionError("a stub is never short")


class CacheMemory(StubMemory):
    """The same on a KVCache on the host whose slots have all their pages mapped."""

    def __init__(self, slots: int, tokens: int) -> None:
        super().__init__(slots)
        # A small model: ensure_many looks at lengths only, as long as nothing is to be mapped.
        self.cache = KVCache(2, 2, 64, torch.float16, max_seqs=slots, max_tokens=tokens)
        everything = np.arange(slots, dtype=np.int32)
        for slot in range(slots):
            self.cache.open(slot=slot)
        self.cache.ensure_many(everything, np.full(slots, tokens, np.int32))
        for slot in range(slots):
            self.cache.release(slot)
        self._calls = self._mapping_calls()

    def admit(self, request: Request) -> bool:
        if not super().admit(request):
            return False
        self.cache.open(slot=request.slot)
        return True

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        self.cache.ensure_many(np.array(slots, np.int32), np.array(tokens, np.int32))
        return True

    def release(self, request: Request) -> None:
        self.cache.release(request.slot)
        super().release(request)

    def _mapping_calls(self) -> int:
        calls = self.cache.stats().driver_calls
        return sum(calls[name] for name in ("create", "map", "set_access", "unmap", "destroy"))

    def close(self) -> None:
        calls = self._mapping_calls() - self._calls
        self.cache.close()
        if calls:
            raise AssertionError(f"{calls} driver calls, although everything was mapped")


class Load:
    """Keeps ``sequences`` requests in the system."""

    def __init__(self, scheduler: Scheduler, load: str, sequences: int, steps: int) -> None:
        self.scheduler = scheduler
        self._is_churn = load == "churn"
        self._longest = PROMPT_TOKENS + steps + 1
        self._made = 0
        self._stop_ids = frozenset({1, 2})
        self._params = SamplingParams(max_tokens=steps + 1)
        waiting = sequences // 8 if self._is_churn else 0
        self.refill(sequences + waiting)

    def refill(self, requests: int) -> None:
        for _ in range(requests):
            limit = self._longest
            if self._is_churn:  # 32 to 287 new tokens, spread evenly
                limit = min(limit, PROMPT_TOKENS + 32 + 89 * self._made % 256)
            prompt = [3] * PROMPT_TOKENS
            self.scheduler.add(
                Request(str(self._made), prompt, self._params, limit, stop_ids=self._stop_ids)
            )
            self._made += 1


def measure(memory_name: str, load_name: str, sequences: int, steps: int) -> Json:
    """Times of ``steps`` steps in microseconds, per part and in total."""
    if memory_name == "engine":
        return measure_engine(load_name, sequences, steps)
    slots, most = sequences + 16, PROMPT_TOKENS + steps + _WARMUP_STEPS + 2
    memory = StubMemory(slots) if memory_name == "stub" else CacheMemory(slots, most)
    scheduler = Scheduler(
        memory,
        max_num_seqs=sequences,
        # All prompts in one step, so that all sequences decode from the second on.
        max_num_batched_tokens=sequences * PROMPT_TOKENS,
        max_model_len=most,
    )
    load = Load(scheduler, load_name, sequences, steps + _WARMUP_STEPS)
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "total")}
    running: list[int] = []
    ends = 0
    gc.collect()
    for i in range(_WARMUP_STEPS + steps):
        marks = [time.perf_counter()]
        plan = scheduler.schedule()
        marks.append(time.perf_counter())
        scheduler.computed(plan)
        scheduler.sampled(plan)
        marks.append(time.perf_counter())
        scheduler.stage()
        marks.append(time.perf_counter())
        sampling = plan.sampling
        tokens = [5] * len(sampling)  # of the stub model, not timed
        marks.append(time.perf_counter())
        scheduler.append_tokens(plan, tokens)
        marks.append(time.perf_counter())
        ended = scheduler.take_finished()
        marks.append(time.perf_counter())
        load.refill(len(ended) if load_name == "churn" else 0)
        if i >= _WARMUP_STEPS:
            parts_s = [b - a for a, b in itertools.pairwise(marks)]
            del parts_s[3]
            for part, seconds in zip(PARTS, parts_s, strict=True):
                times[part].append(seconds * 1e6)
            times["total"].append(sum(parts_s) * 1e6)
            running.append(len(plan.requests))
            ends += len(ended)
    scheduler.abort_all()
    scheduler.check()
    if isinstance(memory, CacheMemory):
        memory.close()
    return {
        "memory": memory_name,
        "load": load_name,
        "sequences": sequences,
        "steps": steps,
        "median_running": statistics.median(running),
        "ended": ends,
        "us": {part: _spread(values) for part, values in times.items()},
    }


def measure_engine(load_name: str, sequences: int, steps: int) -> Json:
    """The same of whole engine steps; there are no parts."""
    times, running, ends = step_times(load_name, sequences, steps, _WARMUP_STEPS, PROMPT_TOKENS)
    return {
        "memory": "engine",
        "load": load_name,
        "sequences": sequences,
        "steps": steps,
        "median_running": statistics.median(running),
        "ended": ends,
        "us": {"total": _spread(times)},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    median, p99 = np.percentile(values, [50, 99])
    return {"median": float(median), "p99": float(p99)}


def _cell(us: dict[str, float] | None) -> str:
    return f"{us['median']:.1f} ({us['p99']:.1f})" if us else "-"


def make_targets(results: Sequence[Json]) -> list[Target]:
    return [
        Target(
            f"step of {r['sequences']} sequences, {r['memory']}, {r['load']}, median",
            r["us"]["total"]["median"],
            TARGET_US,
            "us",
            at_least=False,
            note=(
                "the whole step but the model"
                if r["memory"] == "engine"
                else "schedule, ensure, stop checks"
            ),
        )
        for r in results
    ]


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.scheduler", __doc__)
    cli.add_argument("--memory", action="append", choices=MEMORIES, help="repeatable; default: all")
    cli.add_argument("--load", action="append", choices=LOADS, help="repeatable; default: all")
    cli.add_argument("--sequences", type=_positive, default=256, help="that run at once")
    cli.add_argument("--steps", type=_positive, default=600, help="of each measurement")
    args = cli.parse_args(argv)
    results = [
        measure(memory, load, args.sequences, args.steps)
        for memory in args.memory or MEMORIES
        for load in args.load or LOADS
    ]
    print_table(
        f"us per step of {args.sequences} sequences, median (p99)",
        ["memory", "load", *PARTS, "total"],
        [
            [
                r["memory"],
                r["load"],
                *(_cell(r["us"].get(part)) for part in (*PARTS, "total")),
            ]
            for r in results
        ],
    )
    targets = make_targets(results)
    print_targets(targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, report("scheduler", settings, results, targets))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
