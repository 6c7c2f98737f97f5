"""What mapping adds to decode steps: their times with and without pages mapped meanwhile.

    python -m bench.jitter --trace conv.csv.gz
    python -m bench.jitter --small               # in seconds, to see that it runs

A decode-like step is attention over the slots of a KVCache, all layers, repeated until it takes
some milliseconds; on a GPU it is one CUDA graph. Beside it, in other slots of the same cache,
requests of a trace come, grow and go. Per step they take the tokens that so many running sequences
take on average: one each, and the prompts of those that follow the ones that end. The budget is
full, so every page that they need is first unmapped from a free slot that kept it: by the cache's
mapper, in the background, through ``KVCache.prepare``. Four ways, in turns:

    nothing                      no pages are mapped or unmapped
    trace                        the tokens of the trace, mapped ahead while the device works
    trace x10                    ten times as many
    trace, mapped between steps  as trace, without the mapper: to compare

A step's time is from its launch until the next could be launched. The share of it in which the next
step waits for pages is what mapping costs on the critical path.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.common import Budget, Json, Target, parser, print_table, print_targets
from bench.jitter_loop import WAYS, Times, Traffic, Way, Work, run_steps
from bench.kernels import load_kernels
from bench.partial import Partial
from bench.provenance import gpu_missing
from bench.trace import Trace, open_trace
from bench.waste import footprint
from vattn import KVCache, PagePool
from vattn.config import parse_bytes

CALLS = ("create", "map", "set_access", "unmap", "destroy")
MOST_SHARE = 0.01
# Requests' pages that the budget holds, in steps of the fastest way, and what the slots could keep.
_STEPS_HELD = 4
_KEPT_OVER_HELD = 3

DEFAULTS: dict[str, Json] = {
    "cuda": {
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "batch": 64,
        "length": 2048,
        "running": 256,
        "step_ms": 8.0,
        "turns": 12,
        "steps": 50,
    },
    "cpu": {
        "layers": 8,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "dtype": torch.float32,
        "batch": 4,
        "length": 1024,
        "running": 32,
        "step_ms": 10.0,
        "turns": 8,
        "steps": 25,
    },
}
SMALL: Json = {
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "batch": 2,
    "length": 128,
    "running": 4,
    "step_ms": 1.0,
    "turns": 2,
    "steps": 4,
}


class Loop:
    """A cache with steps over some of its slots and traffic in the others.

    Args:
        args: sizes, see :data:`DEFAULTS`.
        trace: whose requests come and go.

    Raises:
        SystemExit: no attention kernel for the device.
    """

    def __init__(self, args: argparse.Namespace, trace: Trace) -> None:
        kernels, missing = load_kernels(args.device, args.dtype)
        if not kernels:
            raise SystemExit(f"no attention kernel: {missing}")
        self.tokens_per_step = args.running * float(
            1 + trace.context.mean() / trace.generated.mean()
        )
        fastest = self.tokens_per_step * max(way.rate for way in WAYS)
        held = _STEPS_HELD * math.ceil(fastest / trace.total.mean()) + 2
        slots = _KEPT_OVER_HELD * held
        self.pool = PagePool(args.device, page_bytes=args.page_bytes)
        self.cache = KVCache(
            *(args.layers, args.kv_heads, args.head_dim, args.dtype),
            max_seqs=args.batch + slots,
            max_tokens=max(args.length, int(trace.total.max())),
            pool=self.pool,
            layers_per_region=args.layers_per_region,
        )
        kernel, prepare = next(iter(kernels.items()))
        sizes = (args.batch, args.length, args.heads)
        self.work = Work(self.cache, kernel, prepare, *sizes, args.step_ms / 1000)
        self.traffic = Traffic(self.cache, range(args.batch, args.batch + slots), trace.total)
        lengths = np.full(held + 1, math.ceil(trace.total.mean()))
        lengths[0] = trace.total.max()
        layout, tiles = self.cache.layout, self.cache.layout.tiles
        most = footprint(layout.regions, self.pool.page_bytes, tiles, lengths)
        self.pool.set_budget(self.pool.stats().used_bytes + most.live_bytes + most.cover_bytes)
        self._fill_slots(fastest, slots)

    def _fill_slots(self, tokens: float, slots: int) -> None:
        """Until every slot was in use: from then on what is mapped must be unmapped first."""
        while self.traffic.requests < 2 * slots:
            self.traffic.ahead(tokens, mapped=True)
            self.traffic.commit()
        self.traffic.settle()

    def close(self) -> None:
        """Gives everything back.

        Raises:
            AssertionError: pages are left, or what the steps read was disturbed.
        """
        self.traffic.settle()
        self.work.check()
        self.cache.check()
        self.cache.close()
        assert self.pool.stats().used_bytes == 0, self.pool.stats()


def measure(loop: Loop, args: argparse.Namespace, budget: Budget, out: Partial) -> None:
    """All ways in turns; after each turn the results so far are written."""
    times = [Times() for _ in WAYS]
    calls = [dict.fromkeys(CALLS, 0) for _ in WAYS]
    requests = [0 for _ in WAYS]
    for turn in range(args.turns):
        if turn and not budget.allows(f"turn {turn + 1}"):
            continue
        for i in range(len(WAYS)):
            k = (i + turn) % len(WAYS)
            before, begun = loop.pool.driver_calls(), loop.traffic.requests
            tokens = WAYS[k].rate * loop.tokens_per_step
            found = run_steps(loop.work, loop.traffic, tokens, WAYS[k].ahead, args.steps)
            after = loop.pool.driver_calls()
            for op in CALLS:
                calls[k][op] += after[op] - before[op]
            requests[k] += loop.traffic.requests - begun
            times[k].extend(found)
        base = times[0].as_json()
        out.set(
            turns=turn + 1,
            ways=[
                describe(way, spent.as_json(), base, made) | {"requests": ended}
                for way, spent, made, ended in zip(WAYS, times, calls, requests, strict=True)
            ],
        )


def describe(way: Way, found: Json, base: Json, calls: dict[str, int]) -> Json:
    """A way's quantiles, and by how much they exceed those with nothing mapped."""
    return {
        "way": way.name,
        "rate": way.rate,
        "ahead": way.ahead,
        **found,
        "added_us": {
            what: {q: found[what][q] - base[what][q] for q in base[what]}
            for what in ("device_us", "step_us")
        },
        "calls_per_step": {op: n / found["steps"] for op, n in calls.items()},
    }


def print_results(results: Json) -> None:
    rows = [
        [
            *(r["way"], r["steps"]),
            *(f"{r['device_us'][q]:,.0f}" for q in ("p50", "p99", "max")),
            *(f"{r['step_us'][q]:,.0f}" for q in ("p50", "p99", "max")),
            *(f"{r['pages_us'][q]:,.0f}" for q in ("p50", "p99")),
            f"{r['pages_share']:.4f}",
            *(f"{r['calls_per_step'][op]:.1f}" for op in ("map", "set_access", "unmap")),
        ]
        for r in results["ways"]
    ]
    print_table(
        "us of the device and of the step, us of it in which the next waits for pages; calls/step",
        [
            *("beside the steps", "steps", "device p50", "p99", "max", "step p50", "p99", "max"),
            *("pages p50", "p99", "share", "map", "access", "unmap"),
        ],
        rows,
    )


def make_targets(results: Json) -> list[Target]:
    """Of the results so far."""
    by = {row["way"]: row for row in results.get("ways", [])}
    share = by["trace"]["pages_share"] if by else None
    note = f"between steps {by[WAYS[3].name]['pages_share']:.4f}" if by else ""
    name = "mapping on the critical path / step, tokens of the trace"
    return [Target(name, share, MOST_SHARE, "", at_least=False, note=note)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cli = parser("bench.jitter", __doc__)
    cli.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    cli.add_argument("--small", action="store_true", help="few sequences and steps, for CI")
    cli.add_argument("--trace", type=Path, metavar="FILE", help="lengths (csv or csv.gz)")
    cli.add_argument("--layers", type=int)
    cli.add_argument("--heads", type=int, help="query heads")
    cli.add_argument("--kv-heads", type=int)
    cli.add_argument("--head-dim", type=int)
    cli.add_argument("--layers-per-region", type=int, help="default: the device's")
    cli.add_argument("--page-bytes", type=parse_bytes, help="default: the device's")
    cli.add_argument("--batch", type=int, help="sequences of the attention")
    cli.add_argument("--length", type=int, help="tokens of each")
    cli.add_argument("--running", type=int, help="sequences whose pages are mapped")
    cli.add_argument("--step-ms", type=float, help="of the attention, about")
    cli.add_argument("--turns", type=int, help="of each way")
    cli.add_argument("--steps", type=int, help="of a way in a turn")
    cli.add_argument("--budget-s", type=float, help="seconds after which no turn is begun")
    args = cli.parse_args(argv)
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    default = DEFAULTS[args.device] | (SMALL if args.small else {})
    for key, value in default.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    for key in ("layers", "heads", "kv_heads", "batch", "length", "running", "turns", "steps"):
        if getattr(args, key) < 1:
            cli.error(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    trace = open_trace(args.trace)
    if args.small:
        trace = trace.first(min(200, len(trace))).scaled(16)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    out = Partial(args.json, "jitter", settings, make_targets)
    budget = Budget(args.budget_s)
    with torch.inference_mode():
        loop = Loop(args, trace)
        out.set(
            kernel=loop.work.kernel.label,
            rounds=loop.work.rounds,
            page_bytes=loop.pool.page_bytes,
            layers_per_region=len(loop.cache.layout.regions[0].layers),
            trace=trace.as_json(),
            tokens_per_step=loop.tokens_per_step,
            cut_for_time=budget.cut,
        )
        measure(loop, args, budget, out)
        loop.close()
    out.write()  # with what was cut
    print_results(out.results)
    print_targets(out.targets)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
