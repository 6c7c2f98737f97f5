"""vattn's allocator against PyTorch's caching policies on recorded allocations, without a GPU.

    python -m bench.allocator                        # all traces of bench/data/alloc
    python -m bench.allocator --trace FILE.npz
    python -m bench.allocator --save                 # into bench/results/cpu/allocator.json

Each trace is a program's requests and releases in order (`bench/alloc_traces` recorded them). It is
replayed in C++ through

vattn       allocator/, on the real CUDA driver code loaded on the fake libcuda
native      a model of PyTorch's default policy
expandable  a model of it under expandable_segments:True
direct      a cudaMalloc and a cudaFree for each, and what CUDA is thought to make of them

once with every check (no overlap of live blocks, 512-byte alignment, physical memory for all that
is live) for the figures of memory and calls, then several times for the time: wall time inside the
policy, which for vattn has the fake driver's in it and for the models has no driver's at all.
``modelled_driver_ms`` is what the calls would take at published costs. ``live`` counts each request
rounded up to 512 bytes; ``physical`` is all that the policy holds. A pair is a request and its
release that are served from the cache, alone and with another thread on another stream, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.alloc_traces.trace_file import AllocTrace
from bench.allocator_native import POLICIES, Replay, ReplayFailed
from bench.common import (
    RESULTS,
    Json,
    Target,
    parser,
    print_table,
    print_targets,
    report,
    short_bytes,
    sizes,
    write_json,
)
from bench.provenance import ROOT
from vattn.config import parse_bytes

TRACES = ROOT / "bench" / "data" / "alloc"
SAVED = RESULTS / "cpu" / "allocator.json"
PAIR_SIZES = (512, 64 << 10, 4 << 20, 64 << 20)
PAIR_POLICIES = ("vattn", "native")
OURS, TORCH = "vattn", ("native", "expandable")
# Below this peak a page more or less decides, and the ratio has no target.
LEAST_PEAK_BYTES = 256 << 20


# Measuring ----------------------------------------------------------------------------------------


def replay_trace(
    replay: Replay, path: Path, policies: Sequence[str], device_bytes: int, repeat: int
) -> list[Json]:
    """One trace through policies; what the replay printed, and ``ratio`` and ``steady``.

    ``ratio`` is peak physical / peak live, None if the trace did not fit the device. ``steady``:
    all iterations of the trace's second half are the same.

    Raises:
        ReplayFailed: a check failed.
    """
    trace = AllocTrace.load(path)
    steady = 0 <= trace.steady_from <= trace.operations // 2
    found = []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / f"{path.stem}.raw"
        raw.write_bytes(trace.raw())
        for policy in policies:
            try:
                row = replay.trace(raw, policy, device_bytes, repeat)
            except ReplayFailed as error:
                raise ReplayFailed(f"{path.name}, {policy}: {error}") from None
            fits = row["out_of_memory_at"] is None
            ratio = row["peak_physical_bytes"] / row["peak_live_bytes"] if fits else None
            found.append(row | {"trace": trace.name, "ratio": ratio, "steady": steady})
    return found


def measure_pairs(
    replay: Replay, pair_sizes: Sequence[int], policies: Sequence[str], threads: int
) -> list[Json]:
    """Cached pairs of each size in each policy."""
    return [replay.pair(size, policy, threads) for size in pair_sizes for policy in policies]


# Targets ------------------------------------------------------------------------------------------


def make_targets(rows: Sequence[Json], pairs: Sequence[Json], threads: int) -> list[Target]:
    """What the issue asks of vattn's allocator; the worst trace counts, and the note names it."""
    by_trace: dict[str, dict[str, Json]] = {}
    for row in rows:
        by_trace.setdefault(row["trace"], {})[row["policy"]] = row
    ours = {name: found[OURS] for name, found in by_trace.items() if OURS in found}
    too_small = [name for name, row in ours.items() if row["ratio"] is None]
    large = {
        name: row["ratio"]
        for name, row in ours.items()
        if row["ratio"] is not None and row["peak_live_bytes"] > LEAST_PEAK_BYTES
    }
    steady = {
        name: float(row["driver_calls_second_half"]) for name, row in ours.items() if row["steady"]
    }
    ours_pairs = {short_bytes(pair["bytes"]): pair for pair in pairs if pair["policy"] == OURS}
    single = {size: pair["single_ns"] for size, pair in ours_pairs.items()}
    ratios = {size: pair["ratio"] for size, pair in ours_pairs.items()}
    return [
        at_most("traces that do not fit", {", ".join(too_small): float(len(too_small))}, 0, ""),
        at_most("peak physical / live, peaks above 256 MiB", large, 1.05, "x"),
        at_most("physical / that of PyTorch's better policy", against_torch(by_trace), 1, "x"),
        at_most("driver calls, second half of a steady trace", steady, 0, ""),
        at_most("cached allocate + free", single, 300, "ns"),
        at_most(f"the same in {threads} threads / in one", ratios, 2, "x"),
    ]


def against_torch(by_trace: Mapping[str, Mapping[str, Json]]) -> dict[str, float]:
    """Our peak over the lower one of PyTorch's policies, where all of them ran and ours fitted."""
    found = {}
    for name, of in by_trace.items():
        peaks = [of[p]["peak_physical_bytes"] for p in TORCH if p in of and of[p]["ratio"]]
        if OURS in of and of[OURS]["ratio"] and peaks:
            found[name] = of[OURS]["peak_physical_bytes"] / min(peaks)
    return found


def at_most(name: str, measured: Mapping[str, float], limit: float, unit: str) -> Target:
    """The largest of the figures, and whose it is."""
    worst = max(measured, key=lambda key: measured[key], default=None)
    value = None if worst is None else measured[worst]
    return Target(name, value, limit, unit, at_least=False, note=worst or "")


# Output -------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Json]) -> None:
    print_table(
        "peaks; driver calls, and those of the second half; ns per operation in the policy; "
        "its driver calls at published costs",
        [
            *("trace", "policy", "operations", "live", "physical", "ratio"),
            *("calls", "2nd half", "ns/op", "2nd half", "driver ms"),
        ],
        [
            [
                *(row["trace"], row["policy"], row["operations"]),
                *(short_bytes(row["peak_live_bytes"]), short_bytes(row["peak_physical_bytes"])),
                "too large" if row["ratio"] is None else f"{row['ratio']:.3f}",
                *(row["driver_calls"], row["driver_calls_second_half"]),
                *(_rounded(row["ns_per_op"]), _rounded(row["ns_per_op_second_half"])),
                f"{row['modelled_driver_ms']:.1f}",
            ]
            for row in rows
        ],
    )


def _rounded(ns: float | None) -> int | None:
    return None if ns is None else round(ns)


def print_pairs(pairs: Sequence[Json], threads: int) -> None:
    print_table(
        "cached allocate + free, ns",
        ["bytes", "policy", "one thread", f"{threads} threads", "ratio", "driver calls"],
        [
            [
                *(short_bytes(pair["bytes"]), pair["policy"]),
                *(round(pair["single_ns"]), round(pair["threads_ns"])),
                *(f"{pair['ratio']:.2f}", pair["driver_calls"]),
            ]
            for pair in pairs
        ],
    )


# Arguments ----------------------------------------------------------------------------------------


def policy_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(POLICIES)):
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: there is no such policy; use {', '.join(POLICIES)}"
        )
    return names


def trace_files(given: Sequence[Path] | None) -> list[Path]:
    """The traces given, else all that are recorded.

    Raises:
        FileNotFoundError: there are none, or one of them is not there.
    """
    if given is None:
        found = sorted(TRACES.glob("*.npz"))
        if not found:
            raise FileNotFoundError(f"no traces in {TRACES.relative_to(ROOT)}; give --trace FILE")
        return found
    if missing := [path for path in given if not path.is_file()]:
        raise FileNotFoundError(f"--trace {missing[0]} does not exist")
    return list(given)


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.allocator", __doc__)
    cli.add_argument("--trace", type=Path, action="append", metavar="FILE", help="may be repeated")
    cli.add_argument("--policy", type=policy_names, default=list(POLICIES), metavar="LIST")
    cli.add_argument("--device-memory", type=parse_bytes, default=80 << 30, metavar="BYTES")
    cli.add_argument("--repeat", type=int, default=5, help="timed replays; 0 for none")
    cli.add_argument(
        "--pairs", type=sizes, default=list(PAIR_SIZES), metavar="LIST", help="sizes of pairs"
    )
    cli.add_argument("--no-pairs", action="store_const", const=[], dest="pairs")
    cli.add_argument("--threads", type=int, default=2, help="of a pair, on streams of their own")
    cli.add_argument("--replay", type=Path, metavar="FILE", help="the C++ program")
    cli.add_argument("--libcuda", type=Path, metavar="FILE", help="the fake CUDA driver")
    cli.add_argument("--save", action="store_true", help=f"write {SAVED.relative_to(ROOT)}")
    args = cli.parse_args(argv)
    try:
        replay = Replay.find(args.replay, args.libcuda)
        files = trace_files(args.trace)
    except FileNotFoundError as error:
        cli.error(str(error))
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "save")}
    settings["trace"] = [path.name for path in files]
    rows: list[Json] = []
    for path in files:
        rows += replay_trace(replay, path, args.policy, args.device_memory, args.repeat)
    print_rows(rows)
    pair_policies = [policy for policy in PAIR_POLICIES if policy in args.policy]
    pairs = measure_pairs(replay, args.pairs, pair_policies, args.threads)
    if pairs:
        print_pairs(pairs, args.threads)
    targets = make_targets(rows, pairs, args.threads) if OURS in args.policy else []
    print_targets(targets)
    document = report("allocator", settings, rows, targets) | {"pairs": pairs}
    for file in (args.json, SAVED if args.save else None):
        if file is not None:
            write_json(file, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
