"""Whether mapping hides behind the device's work, at the published costs of the driver's calls.

    python -m bench.overlap --trace conv.csv.gz
    python -m bench.overlap --small               # in seconds, to see that it runs

The engine's scheduler and memory manager over a KVCache of Llama-3-8B's shape, with 256 running
sequences and a queue that never ends: whoever is done is replaced by a request of the trace. There
is no model: the device takes 10 ms a step (a deadline), and every sampled token is the same. The
driver is the real CUDA driver on the fake libcuda, each call of which takes what it was published
to take. A step's time is from launch to launch; beside it what mapping adds to the device's time,
which the load of the machine hardly changes. Four ways to run the same requests, in turns:

    ahead       the engine's: the next step's pages are mapped by the mapper while the device works,
                those of requests about to be admitted too, and pages are created ahead of need
    sync        all mapping between two steps, when the need is there
    sync fresh  the same, and a released slot keeps nothing: no stale pages, no prefix cache
    free        as ahead, with calls that cost nothing: what the engine and this machine take

Two phases: ``steady``, when as many pages exist as the budget allows, and ``growing``, the first
steps of an engine without a page, all of which have to be created.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from bench.common import Json, Target, parser, print_table, print_targets, report, write_json
from bench.fake import PUBLISHED_US, charge, fake_gpu
from bench.overlap_loop import WAYS, Loop, Times, wake_in_time
from bench.trace import Trace, open_trace
from tests.fake_cuda.fake import FakeCuda
from vattn.config import parse_bytes

FREE_US = dict.fromkeys(PUBLISHED_US, 0.0)
CALLS = ("create", "map", "set_access", "unmap", "destroy")


def take_turns(
    loops: Sequence[Loop], fake: FakeCuda, args: argparse.Namespace, turns: int, steps: int
) -> list[Json]:
    """Every loop does ``steps`` steps in each turn."""
    times = [Times() for _ in loops]
    made = [loop.pool.driver_calls() for loop in loops]
    ended = [loop.ended for loop in loops]
    for turn in range(turns):
        for i in range(len(loops)):
            k = (i + turn) % len(loops)
            charge(fake, PUBLISHED_US if loops[k].way.costs else FREE_US)
            loops[k].run(steps, args.device_ms / 1000, times[k])
            loops[k].settle()
    charge(fake, FREE_US)
    found = []
    for loop, spent, before, begun in zip(loops, times, made, ended, strict=True):
        calls = loop.pool.driver_calls()
        n = len(spent.step_s)
        found.append(
            {
                "way": loop.way.name,
                **spent.as_json(args.device_ms / 1000),
                "requests_ended": loop.ended - begun,
                "preemptions": loop.scheduler.stats().preemptions,
                "calls_per_step": {op: (calls[op] - before[op]) / n for op in CALLS},
                "created_bytes": loop.pool.stats().created_bytes,
                "live_bytes": loop.cache.stats().live_bytes,
            }
        )
    return found


def measure(phase: str, args: argparse.Namespace, trace: Trace) -> list[Json]:
    """One phase of all ways.

    Raises:
        AssertionError: pages are left, or a rule of the driver was broken.
    """
    with fake_gpu() as fake:
        loops = [Loop(way, trace, args) for way in WAYS]
        for loop in loops:
            loop.run(args.warm_up if phase == "steady" else 0, 0.0, None)
            loop.settle()
        turns, steps = (args.turns, args.steps) if phase == "steady" else (1, args.growing_steps)
        found = take_turns(loops, fake, args, turns, steps)
        for loop in loops:
            loop.close()
        del loops, loop
        gc.collect()
    return [{"phase": phase} | each for each in found]


def print_results(results: Sequence[Json]) -> None:
    rows = []
    for r in results:
        step, calls = r["step_over_device"], r["calls_per_step"]
        rows.append(
            [
                *(r["phase"], r["way"], r["steps"], r["requests_ended"]),
                *(f"{step[q]:.3f}" for q in ("p50", "p99", "max")),
                f"{r['with_pages_over_device']['p99']:.3f}",
                *(f"{r[what][q]:.0f}" for what in ("host_us", "pages_us") for q in ("p50", "p99")),
                *(f"{calls[op]:.1f}" for op in ("create", "map", "set_access", "unmap")),
            ]
        )
    print_table(
        "step / device time; us between the device's steps, and of them for pages; calls per step",
        [
            *("phase", "way", "steps", "ended", "p50", "p99", "max", "pages only p99"),
            *("host p50", "p99", "pages p50", "p99", "create", "map", "access", "unmap"),
        ],
        rows,
    )


def make_targets(results: Sequence[Json]) -> list[Target]:
    """What mapping adds to a step, and the step with all that this machine adds to it."""
    steady = {r["way"]: r for r in results if r["phase"] == "steady"}

    def p99(way: str, what: str) -> float:
        return float(steady[way][what]["p99"])

    def at_most(name: str, measured: float, note: str) -> Target:
        return Target(name, measured, 1.02, "x", at_least=False, note=note)

    pages, step = "with_pages_over_device", "step_over_device"
    late_us = steady["free"]["late_wake_up_us"]["p99"]
    return [
        at_most(
            "p99 of device and waiting for pages / device",
            p99("ahead", pages),
            f"sync {p99('sync', pages):.3f}, without any cost {p99('free', pages):.3f}",
        ),
        at_most(
            "p99 step / device",
            p99("ahead", step),
            f"sync {p99('sync', step):.3f}, without any cost {p99('free', step):.3f}; this machine "
            f"wakes up {late_us:.0f} us late",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.overlap", __doc__)
    cli.add_argument("--small", action="store_true", help="few sequences and steps, for CI")
    cli.add_argument("--trace", type=Path, metavar="FILE", help="lengths (csv or csv.gz)")
    cli.add_argument("--running", type=int, default=256)
    cli.add_argument("--queued", type=int, default=32, help="requests that wait at any time")
    cli.add_argument("--slots-per-sequence", type=int, default=3, help="as in the engine")
    cli.add_argument("--step-tokens", type=int, default=2048, help="max_num_batched_tokens")
    cli.add_argument("--layers", type=int, default=32)
    cli.add_argument("--device-ms", type=float, default=10.0)
    cli.add_argument("--budget", type=parse_bytes, default=72 << 30)
    cli.add_argument("--ahead-bytes", type=parse_bytes, default=256 << 20)
    cli.add_argument("--warm-up", type=int, default=2500, help="steps without a device before")
    cli.add_argument("--turns", type=int, default=8)
    cli.add_argument("--steps", type=int, default=100, help="of a way in a turn")
    cli.add_argument("--growing-steps", type=int, default=200)
    args = cli.parse_args(argv)
    trace = open_trace(args.trace)
    if args.small:
        args.running, args.queued, args.layers, args.step_tokens = 16, 4, 8, 256
        args.budget, args.ahead_bytes = 240 << 20, 32 << 20
        args.warm_up, args.turns, args.steps, args.growing_steps = 60, 2, 10, 10
        args.device_ms = min(args.device_ms, 2.0)
        trace = trace.first(200).scaled(8)
    wake_in_time()
    results = [r for phase in ("steady", "growing") for r in measure(phase, args, trace)]
    print_results(results)
    targets = [] if args.small else make_targets(results)
    print_targets(targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings["costs_us"] = dict(PUBLISHED_US)
        found = {"trace": trace.as_json(), "ways": results}
        write_json(args.json, report("overlap", settings, found, targets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
