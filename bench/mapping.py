"""What mapping takes of a step, in the steady state of an engine that serves a trace.

    python -m bench.mapping --trace conv.csv.gz     # Llama-3-8B on a GPU, a small Llama on a CPU
    python -m bench.mapping                         # lengths drawn like those of the trace

An engine with random weights and a queue that never ends: who is done is replaced by a request of
the trace. It is warm when every sequence was replaced once and the KV cache has used its budget up,
so that a new page is one that a finished request gives up. If that takes longer than --warm-up-s,
or than half of --budget-s, the figures are of no steady state, and the target counts as not
measured. From then on each step's time, from one return of step() to the next, and of it:

waiting   in the calls that the scheduler makes for pages: KVCache.ensure_many for those that run,
          admission for those that come
ensure    of it in KVCache.ensure_many

Both are of the host. With asynchronous scheduling the device works meanwhile, so they are the most
that mapping can add to a step. Two ways, in turns: ``ahead``, the engine's, where the next step's
pages are mapped in the background, and ``sync``, where they are mapped when they are needed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.common import Budget, Json, Target, print_table
from bench.model_args import (
    has_time,
    load_shape,
    model_parser,
    names,
    parse,
    settings_of,
)
from bench.partial import Partial
from bench.served import greedy, how_it_ran
from bench.trace import Trace, open_trace
from bench.waits import Steps, Watch
from vattn.config import parse_bytes
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.hf.model import LoadedModel

WAYS = ("ahead", "sync")
DEFAULTS: dict[str, Json] = {
    "cuda": {
        "shape": "llama3-8b",
        "dtype": "bfloat16",
        "running": 128,
        "queued": 32,
        "step_tokens": 4096,
        "kv_budget": 24 << 30,
        "steps": 1500,
        "divisor": 1,
    },
    "cpu": {
        "shape": "small-llama",
        "dtype": "float32",
        "running": 16,
        "queued": 4,
        "step_tokens": 256,
        "kv_budget": 48 << 20,
        "steps": 200,
        "divisor": 8,
    },
}
# The share of the KV cache's budget from which on it counts as used up.
_FULL = 0.95


class Server:
    """An engine with a queue that never ends.

    Args:
        loaded: the model.
        args: sizes.
        trace: requests, taken in order, over and over.
    """

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace, trace: Trace) -> None:
        config = EngineConfig(
            max_num_seqs=args.running,
            max_num_batched_tokens=args.step_tokens,
            max_model_len=int(trace.total.max()),
            kv_cache_memory_bytes=args.kv_budget,
            attention_backend=args.backend,
            swap_space=0,
            compile_model=args.compile,
            # All sequences run at all times, so the other graphs would not be used.
            cudagraph_capture_sizes=[args.running],
        )
        self.engine = Engine(loaded, config)
        self.trace = trace
        self.waiting = args.running + args.queued
        self.added = self.ended = 0
        self._random = np.random.default_rng(0)
        self.watch = Watch()
        self.watch.add(self.engine.memory, "grow")
        self.watch.add(self.engine.memory, "admit")
        self.watch.add(self.engine.cache, "ensure_many")

    def step(self) -> None:
        """Fills the queue and runs a step.

        Raises:
            AssertionError: a request failed.
        """
        while self.added - self.ended < self.waiting:
            i = self.added % len(self.trace)
            prompt = self._random.integers(0, self.engine.loaded.vocab_size, self.trace.context[i])
            params = greedy(int(self.trace.generated[i]))
            (request,) = self.engine.make_requests(str(self.added), prompt.tolist(), params)
            self.engine.add(request)
            self.added += 1
        for request in self.engine.step():
            assert request.error is None, request.error
            self.ended += request.finished

    @property
    def full(self) -> float:
        """Share of the KV cache's budget that exists as pages."""
        stats = self.engine.cache.pool.stats()
        return stats.created_bytes / stats.budget_bytes

    def warm_up(self, replaced: int, limit_s: float) -> bool:
        """Steps until the steady state, or the time limit; whether it was reached."""
        end = time.perf_counter() + limit_s
        while self.ended < replaced or self.full < _FULL:
            if time.perf_counter() > end:
                return False
            self.step()
        return True

    def turn(self, way: str, steps: int, found: Steps) -> None:
        """So many steps in one of the ways, after those in flight of another."""
        self.engine.scheduler.stage_ahead = way == "ahead"
        for _ in range(2):
            self.step()
        self.watch.take()
        before, ended = self.engine.cache.stats().driver_calls, self.ended
        last = time.perf_counter()
        for _ in range(steps):
            self.step()
            now = time.perf_counter()
            waiting_s, by_name = self.watch.take()
            found.step_s.append(now - last)
            found.waiting_s.append(waiting_s)
            found.ensure_s.append(by_name["ensure_many"])
            last = now
        for op, calls in self.engine.cache.stats().driver_calls.items():
            found.calls[op] += calls - before[op]
        found.ended += self.ended - ended


def measure(server: Server, args: argparse.Namespace, budget: Budget, out: Partial) -> None:
    """All ways in turns, after half of the time or --warm-up-s at most for getting warm."""
    left_s = math.inf if budget.seconds is None else budget.seconds - budget.spent_s
    steady = server.warm_up(args.running, min(args.warm_up_s, left_s / 2))
    out.set(steady=steady, budget_used=server.full, replaced=server.ended, warm_up_s=budget.spent_s)
    found = {way: Steps() for way in args.ways}
    length = min(args.turn, args.steps)
    turns = -(-args.steps // length)
    for turn in range(turns):
        # One at least: results that are not there say nothing.
        if turn and not has_time(budget, f"turns {turn + 1} to {turns}"):
            break
        for way, steps in found.items():
            server.turn(way, length, steps)
        out.set(ways={way: steps.as_json() for way, steps in found.items()})
    out.set(live_bytes=server.engine.cache.stats().live_bytes, **how_it_ran(server.engine))


# Output -------------------------------------------------------------------------------------------


def print_results(results: Json) -> None:
    rows = []
    for way, r in results.get("ways", {}).items():
        calls = r["calls_per_step"]
        rows.append(
            [
                *(way, r["steps"], r["requests_ended"]),
                *(r["step_us"][q] for q in ("p50", "p99")),
                *(r["waiting_us"][q] for q in ("p50", "p99")),
                *(f"{share:.2%}" for share in (r["waiting_share"], r["ensure_share"])),
                *(f"{calls.get(op, 0):.1f}" for op in ("create", "map", "set_access", "unmap")),
            ]
        )
    print_table(
        "steps, us; of them waiting for pages; driver calls per step",
        [
            *("way", "steps", "ended", "p50", "p99", "waiting p50", "p99"),
            *("waiting", "in ensure", "create", "map", "access", "unmap"),
        ],
        rows,
    )
    if not results.get("steady", True):
        print(not_steady(results))
    if results["cut_for_time"]:
        print(f"no time for: {', '.join(results['cut_for_time'])}")


def not_steady(results: Json) -> str:
    """Why the results say nothing about the steady state."""
    return (
        f"not in the steady state after warming up: {results['replaced']} requests ended, "
        f"{results['budget_used']:.0%} of the KV cache's budget used; give more time or a smaller "
        "--kv-budget"
    )


def make_targets(args: argparse.Namespace, results: Json) -> list[Target]:
    """Of the engine's way on a GPU; not measured if the steady state was not reached."""
    if (args.shape, args.device) != ("llama3-8b", "cuda"):
        return []
    ways: Json = results.get("ways", {})
    ahead = ways.get("ahead")
    share = None if ahead is None else ahead["waiting_share"]
    notes = [f"{way} {r['waiting_share']:.2%}" for way, r in ways.items() if way != "ahead"]
    if not results.get("steady", True):
        share, notes = None, [not_steady(results)]
    name = "waiting for pages, share of the steps' time"
    return [Target(name, share, 0.01, "", at_least=False, note=", ".join(notes))]


def main(argv: Sequence[str] | None = None) -> int:
    cli = model_parser("bench.mapping", __doc__)
    cli.add_argument("--trace", type=Path, metavar="FILE", help="lengths (csv or csv.gz)")
    cli.add_argument("--ways", type=names(WAYS), default=list(WAYS), metavar="LIST")
    cli.add_argument("--running", type=int, help="sequences at once")
    cli.add_argument("--queued", type=int, help="requests that wait at any time")
    cli.add_argument("--step-tokens", type=int, help="max_num_batched_tokens")
    cli.add_argument("--kv-budget", type=parse_bytes, help="of the KV cache")
    cli.add_argument("--steps", type=int, help="timed, of each way")
    cli.add_argument("--warm-up-s", type=float, default=120.0, help="for warming up, at most")
    cli.add_argument("--turn", type=int, default=50, help="steps of a way in a turn")
    cli.add_argument("--divisor", type=int, help="of the trace's lengths")
    cli.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the model")
    args = parse(cli, argv, DEFAULTS)
    budget = Budget(args.budget_s)
    trace = open_trace(args.trace)
    if args.divisor > 1:
        trace = trace.scaled(args.divisor)
    out = Partial(args.json, "mapping", settings_of(args), lambda found: make_targets(args, found))
    out.set(trace=trace.as_json())
    loaded = load_shape(args, int(trace.total.max()))
    server = Server(loaded, args, trace)
    try:
        with out.part("steps"):
            measure(server, args, budget, out)
    finally:
        server.engine.close()
    out.set(cut_for_time=budget.cut, seconds=budget.spent_s)
    print_results(out.results)
    return out.end(rows=("ways",))


if __name__ == "__main__":
    raise SystemExit(main())
