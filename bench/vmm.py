"""Cost of the virtual-memory operations, by page size and run length, on every driver here.

    python -m bench.vmm                       # every driver of this machine
    python -m bench.vmm --driver fake         # a smoke test: the fake is not a measurement

Four parts: each driver operation, whole runs against one page per call; the host driver's map
against the bare mmap calls; what a first touch costs; ``ensure`` that has nothing to do. On a GPU
also each call beside a running kernel. Times of driver operations are those inside the driver.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench.common import (
    Budget,
    Json,
    Target,
    counts,
    parser,
    print_table,
    print_targets,
    short_bytes,
    sizes,
)
from bench.ensure import find_native, measure_ensure_many, run_native
from bench.partial import Partial
from bench.provenance import ROOT, gpu_missing
from bench.vmm_ops import (
    BARE_KINDS,
    measure_bare_map,
    measure_device_touch,
    measure_host_touch,
    measure_ops,
)
from vattn import DriverError, _core

MIB = 1 << 20
FAKE = Path(os.environ.get("VATTN_FAKE_CUDA", ROOT / "build/fake_cuda/libfake_cuda.so"))
# Enough for the median to settle, little enough for 2 MiB pages in long runs to fit in memory.
MAX_RUN_BYTES = {"host": 256 * MIB, "host-strict": 256 * MIB, "fake": 64 * MIB, "cuda": 2048 * MIB}


def open_drivers(names: Sequence[str]) -> tuple[dict[str, _core.Driver], dict[str, str]]:
    """The drivers asked for, and why those that are missing are."""
    drivers: dict[str, _core.Driver] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            if name == "host":
                drivers[name] = _core.host_driver()
            elif name == "host-strict":
                drivers[name] = _core.host_driver(strict=True)
            elif name == "cuda":
                drivers[name] = _core.cuda_driver()
            elif FAKE.exists():
                drivers[name] = _core.cuda_driver(libcuda=str(FAKE))
            else:
                missing[name] = f"{FAKE} is not built; run make fake"
        except DriverError as error:
            missing[name] = str(error)
    return drivers, missing


def page_sizes(driver: _core.Driver, wanted: Sequence[int] | None) -> list[int]:
    grain = driver.granularity()
    if wanted is not None:
        return [size for size in wanted if size % grain == 0]
    if grain >= MIB:
        return [grain, 2 * grain, 4 * grain, 8 * grain, 16 * grain]
    return [16 << 10, 64 << 10, 2 * MIB]


def run_ops(
    drivers: dict[str, _core.Driver], args: argparse.Namespace, budget: Budget
) -> list[Json]:
    results = []
    for name, driver in drivers.items():
        for page in page_sizes(driver, args.pages):
            for run in args.runs:
                what = f"operations: {name}, {short_bytes(page)} x {run}"
                if page * run <= MAX_RUN_BYTES[name] and budget.allows(what):
                    results += [
                        cost.as_json() for cost in measure_ops(driver, name, page, run, args.rounds)
                    ]
    print_table(
        "driver operations, us per page inside the driver (API calls per run)",
        ["driver", "op", "page", "run", "whole run", "one by one", "ratio", "calls", "calls 1x1"],
        [
            [
                r["driver"],
                r["op"],
                short_bytes(r["page_bytes"]),
                r["run_pages"],
                r["run_us_per_page"],
                r["single_us_per_page"],
                r["ratio"],
                r["run_api_calls"],
                r["single_api_calls"],
            ]
            for r in results
        ],
    )
    return results


def run_bare(args: argparse.Namespace) -> list[Json]:
    pages = [size for size in args.pages or (16 << 10, 64 << 10, 2 * MIB) if size % 4096 == 0]
    results = [
        measure_bare_map(page, run, kind, args.pairs).as_json()
        for page in pages
        for run in args.runs
        for kind in BARE_KINDS
        if page * run <= 64 * MIB and (run > 1 or kind != "scattered")
    ]
    print_table(
        "host: map of a run against the bare mmap calls (MAP_POPULATE); new: never mapped before",
        ["page", "run", "pages", "mmaps", "driver us", "bare us", "slowdown", "from Python"],
        [
            [
                short_bytes(r["page_bytes"]),
                r["run_pages"],
                r["kind"],
                r["mmap_calls"],
                r["driver_us"],
                r["bare_us"],
                r["slowdown"],
                r["slowdown_from_python"],
            ]
            for r in results
        ],
    )
    return results


def run_touch(drivers: dict[str, _core.Driver], args: argparse.Namespace) -> dict[str, list[Json]]:
    results: dict[str, list[Json]] = {}
    if "host" in drivers:
        results["host"] = measure_host_touch(args.touch_mib * MIB, args.rounds)
        print_table(
            "host: first touch, us per 2 MiB (bare calls)",
            ["what", "us"],
            [[r["what"], r["us_per_2MiB"]] for r in results["host"]],
        )
    if "cuda" in drivers:
        driver = drivers["cuda"]
        results["cuda"] = [
            row
            for page in page_sizes(driver, args.pages)
            for row in measure_device_touch(driver, page, max(1, 256 * MIB // page))
        ]
        print_table(
            "cuda: fill of fresh mappings, us per page",
            ["what", "page", "us"],
            [[r["what"], short_bytes(r["page_bytes"]), r["us_per_page"]] for r in results["cuda"]],
        )
    return results


def run_ensure(args: argparse.Namespace, devices: Sequence[str]) -> Json:
    found: Json = {"native": None, "python": []}
    native = find_native(args.ensure_bench)
    if native is not None:
        found["native"] = run_native(native)
    for device in devices:
        found["python"] += measure_ensure_many(device, args.sequences, args.pairs)
    print_table(
        f"ensure that needs nothing (native: {native or 'not built'})",
        ["device", "what", "sequences", "us", "best us"],
        [[r["device"], r["what"], r["sequences"], r["us"], r["best_us"]] for r in found["python"]],
    )
    return found


def make_targets(results: Json) -> list[Target]:
    """Of the results so far."""
    targets = []
    for what, kinds in (("existing", ("neighbours", "scattered")), ("new", ("new",))):
        bare = [r["slowdown"] for r in results.get("bare_map", []) if r["kind"] in kinds]
        if bare:
            name = f"host map of {what} pages / bare mmap, worst of the grid"
            targets.append(Target(name, max(bare), 1.3, "x", at_least=False))
    if "ensure" not in results:
        return targets
    native = results["ensure"]["native"]
    nanoseconds = None if native is None else float(native["ensure_ns_per_sequence"])
    note = "" if native else "vattn_ensure_bench is not built"
    targets.append(
        Target("ensure in C++, per sequence", nanoseconds, 50, "ns", at_least=False, note=note)
    )
    for row in results["ensure"]["python"]:
        name = f"ensure_many of {row['sequences']}, {row['device']}, {row['what']}"
        targets.append(Target(name, row["us"], 20, "us", at_least=False))
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.vmm", __doc__)
    cli.add_argument(
        "--driver",
        action="append",
        choices=["host", "host-strict", "cuda", "fake"],
        help="repeatable; default: host, host-strict and cuda where there is one",
    )
    cli.add_argument("--pages", type=sizes, metavar="SIZES", help="page sizes, such as 16KiB,2MiB")
    cli.add_argument("--runs", type=counts, default=[1, 8, 64, 256], help="run lengths in pages")
    cli.add_argument("--rounds", type=int, default=9, help="of each operation")
    cli.add_argument("--pairs", type=int, default=35, help="of each comparison")
    cli.add_argument("--sequences", type=int, default=256, help="of ensure_many")
    cli.add_argument("--touch-mib", type=int, default=32, help="memory touched on the host")
    cli.add_argument("--budget-s", type=float, help="seconds after which nothing more is begun")
    cli.add_argument(
        "--beside-rounds", type=int, default=5, help="of each call beside a kernel, some 50 ms each"
    )
    cli.add_argument(
        "--ensure-bench", type=Path, metavar="PATH", help="default: newest build/**/ of that name"
    )
    args = cli.parse_args(argv)
    names = args.driver or ["host", "host-strict", "cuda"]
    drivers, missing = open_drivers(names)
    for name, reason in missing.items():
        print(f"no {name} driver: {reason}")
    if args.driver and missing:
        return 1
    devices = [d for d in ("cpu", "cuda") if {"cpu": "host", "cuda": "cuda"}[d] in drivers]
    budget = Budget(args.budget_s)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    out = Partial(args.json, "vmm", settings, make_targets)
    out.set(missing_drivers=missing, cut_for_time=budget.cut)
    # What only a GPU shows comes first: a run cut short has it.
    beside = None
    if "cuda" in drivers and gpu_missing() is None:
        from bench.gpu.beside import measure_beside

        pages = page_sizes(drivers["cuda"], args.pages)
        beside = measure_beside(drivers["cuda"], pages, args.beside_rounds, budget)
    out.set(beside_a_kernel=beside)
    first = {name: drivers[name] for name in sorted(drivers, key=lambda name: name != "cuda")}
    out.set(operations=run_ops(first, args, budget))
    out.set(touch=run_touch(drivers, args) if budget.allows("touch") else {})
    if budget.allows("ensure"):
        out.set(ensure=run_ensure(args, devices))
    if "host" in drivers and budget.allows("bare_map"):
        out.set(bare_map=run_bare(args))
    out.write()  # with what was cut
    print_targets(out.targets)
    if budget.cut:
        print(f"cut for time: {', '.join(budget.cut)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
