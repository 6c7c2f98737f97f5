"""vattn's allocator against PyTorch's caching policies, on recorded allocations. No GPU needed.

    python -m bench allocator                    # all traces of bench/data/alloc
    python -m bench allocator --trace FILE.npz

A trace is a program's requests and releases in order. It is replayed in C++ through vattn's
allocator on the real CUDA driver code loaded on the fake libcuda, through models of PyTorch's two
policies, and through plain driver calls; ``python -m bench.allocator`` is the same without a
level's plot and budget, and says more about each figure. A GPU changes none of them. What training,
fragmentation and cached pairs cost on one is measured by ``python -m bench.allocator_gpu``, a stage
of its own of ``make gpu-check``, since it takes minutes and many processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench import allocator
from bench.allocator_native import POLICIES, Replay
from bench.common import Json, Target, short_bytes, sizes
from bench.levels.level import Level
from bench.levels.table import Table
from bench.partial import Partial
from vattn.config import parse_bytes

GPU = "on a GPU: training, fragmentation, cached pairs"
# What the result says of a replay; the traces' files and bench.allocator's result have the rest.
_KEPT = (
    *("trace", "policy", "operations", "peak_live_bytes", "peak_physical_bytes", "ratio", "steady"),
    *("driver_calls", "driver_calls_second_half", "ns_per_op", "ns_per_op_second_half"),
    "modelled_driver_ms",
)
_PAIR_KEPT = ("bytes", "policy", "threads", "single_ns", "threads_ns", "ratio", "driver_calls")
_SMALL = ("train_steady", "beam")

_FULL: Json = {
    "trace": None,
    "policy": list(POLICIES),
    "device_memory": 80 << 30,
    "repeat": 5,
    "pair_sizes": list(allocator.PAIR_SIZES),
    "pair_threads": 2,
}


class Allocator(Level):
    """Peaks, driver calls and time of allocation policies; see the module."""

    name = "allocator"
    summary = __doc__ or ""
    rows = ("replays",)
    defaults: ClassVar[Mapping[str, Json]] = {"cpu": _FULL, "cuda": _FULL}
    small: ClassVar[Json] = {
        "trace": [allocator.TRACES / f"{name}.npz" for name in _SMALL],
        "repeat": 1,
        "pair_sizes": [64 << 10],
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        add = cli.add_argument
        add("--trace", type=Path, action="append", metavar="FILE", help="may be repeated")
        add("--policy", type=allocator.policy_names, metavar="LIST", help=", ".join(POLICIES))
        add("--device-memory", type=parse_bytes, metavar="BYTES")
        add("--repeat", type=int, help="timed replays; 0 for none")
        add("--pair-sizes", type=sizes, metavar="LIST", help="of cached pairs")
        add("--pair-threads", type=int, help="of a pair, on streams of their own")
        add("--replay", type=Path, metavar="FILE", help="the C++ program")
        add("--libcuda", type=Path, metavar="FILE", help="the fake CUDA driver")

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        absent = {GPU: "a stage of its own: python -m bench.allocator_gpu"}
        out.set(absent=absent)
        with out.part("replays"):
            replay = Replay.find(args.replay, args.libcuda)
            for path in allocator.trace_files(args.trace):
                if args.budget.allows(path.stem):
                    self._replay(args, out, replay, path)
        with out.part("pairs"):
            replay = Replay.find(args.replay, args.libcuda)
            policies = [policy for policy in allocator.PAIR_POLICIES if policy in args.policy]
            for size in args.pair_sizes:
                if args.budget.allows(f"pairs of {size} bytes"):
                    for pair in allocator.measure_pairs(
                        replay, [size], policies, args.pair_threads
                    ):
                        out.append("pairs", _some(pair, _PAIR_KEPT))

    def _replay(self, args: argparse.Namespace, out: Partial, replay: Replay, path: Path) -> None:
        found = allocator.replay_trace(replay, path, args.policy, args.device_memory, args.repeat)
        for row in found:
            out.append("replays", _some(row, _KEPT))

    def tables(self, results: Json) -> list[Table]:
        made = []
        if rows := results.get("replays"):
            made.append(replay_table(rows))
        if pairs := results.get("pairs"):
            made.append(pair_table(pairs))
        return made

    def targets(self, settings: Json, results: Json) -> list[Target]:
        rows, pairs = results.get("replays", []), results.get("pairs", [])
        if allocator.OURS not in settings["policy"] or not (rows or pairs):
            return []
        return allocator.make_targets(rows, pairs, settings["pair_threads"])

    def draw(self, figure: Any, results: Json) -> bool:
        rows = [row for row in results.get("replays", ()) if row["ratio"] is not None]
        if not rows:
            return False
        traces, policies = _in_order(rows, "trace"), _in_order(rows, "policy")
        ratios = {(row["trace"], row["policy"]): row["ratio"] for row in rows}
        axis = figure.subplots()
        width = 0.8 / len(policies)
        for i, policy in enumerate(policies):
            points = [(x, ratios.get((trace, policy))) for x, trace in enumerate(traces)]
            there = [(x + i * width, ratio) for x, ratio in points if ratio is not None]
            axis.bar(*zip(*there, strict=True), width, label=policy)
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(traces))], traces, fontsize="small")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("peak physical / peak live bytes")
        axis.set_ylim(0, LARGEST_SHOWN)
        axis.legend(fontsize="small")
        return True


LARGEST_SHOWN = 3.0  # a policy beyond it is cut off; the table has its figure


def replay_table(rows: Sequence[Json]) -> Table:
    """Peaks, calls and times."""
    return Table(
        "recorded allocations: peaks, driver calls, ns per operation, driver at published costs",
        [
            *("trace", "policy", "operations", "live", "physical", "ratio", "calls", "2nd half"),
            *("ns/op", "2nd half ", "driver ms"),
        ],
        [
            [
                *(r["trace"], r["policy"], r["operations"]),
                *(short_bytes(r["peak_live_bytes"]), short_bytes(r["peak_physical_bytes"])),
                "too large" if r["ratio"] is None else f"{r['ratio']:.3f}",
                *(r["driver_calls"], r["driver_calls_second_half"]),
                *(_whole(r["ns_per_op"]), _whole(r["ns_per_op_second_half"])),
                f"{r['modelled_driver_ms']:.1f}",
            ]
            for r in rows
        ],
        "native and expandable are models of PyTorch's policies. The time of vattn has the fake "
        "driver's in it, and that of the models no driver's.",
    )


def pair_table(pairs: Sequence[Json]) -> Table:
    """Requests that the cache serves."""
    return Table(
        "cached allocate + free, ns",
        ["bytes", "policy", "one thread", "threads", "ns in threads", "ratio", "driver calls"],
        [
            [
                *(short_bytes(p["bytes"]), p["policy"], _whole(p["single_ns"]), p["threads"]),
                *(_whole(p["threads_ns"]), f"{p['ratio']:.2f}", p["driver_calls"]),
            ]
            for p in pairs
        ],
    )


def _some(row: Json, keys: Sequence[str]) -> Json:
    return {key: _rounded(row[key]) for key in keys}


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def _whole(ns: float | None) -> int | None:
    return None if ns is None else round(ns)


def _in_order(rows: Sequence[Json], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
