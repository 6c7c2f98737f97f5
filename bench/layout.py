"""What a layout costs: attention time on virtual slots, page tails, tile cover and driver calls.

    python -m bench.layout                        # the grid of this machine's device
    python -m bench.layout --save                 # ... into bench/results/<device>/layout.json
    python -m bench.layout --trace conv.csv.gz    # lengths from a trace, for the waste

Each kernel runs on slots of a KVCache and on ordinary tensors (torch.empty, K and V apart, tokens
first on a GPU, heads first on a CPU, as their kernels like it best), taking turns and going round
enough layers that none is still in the last-level cache. A ratio is ordinary / virtual, median over
neighbouring pairs: 1 is no cost, below 1 the virtual side is slower. The floor is K and V once at
the copy bandwidth measured in this run. Before timing, each kernel is checked against float32 on
ragged slots with NaN beyond the tiles. With less time than the grid needs (--budget-s), its end is
cut and listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.common import (
    RESULTS,
    Budget,
    Json,
    counts,
    parser,
    report,
    sizes,
    write_json,
)
from bench.device import copy_bandwidth, free_bytes
from bench.kernels import Kernel, Prepare, load_kernels
from bench.layout_cells import Bench, Model, fits
from bench.layout_tables import layouts, name_of, points, print_grid, print_layouts
from bench.provenance import device_slug, gpu_missing
from bench.trace import Lengths
from bench.waste import draw_lengths, footprint, read_lengths
from vattn.kv.cache import DEFAULT_TILES
from vattn.kv.layout import LayerSpec, make_layout

MIB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A wrong result, an error of the device, too little memory: the cell is lost, the grid goes on.
FAILURES = (AssertionError, RuntimeError, MemoryError)

# The published grid per kind of device; "rest" of the page sizes comes last and is cut first.
DEFAULTS: dict[str, Json] = {
    "cuda": {
        "model": Model(32, 32, 8, 128, torch.bfloat16),
        "layers_per_region": [1, 2, 4, 8, None],
        "pages": [2 * MIB, 32 * MIB, 8 * MIB, 4 * MIB, 16 * MIB],
        "orders": ["token"],
        "lengths": [1024, 4096, 16384, 65536],
        "batches": [1, 8, 64],
        "queries": [1, 512],
        "budget_s": 170.0,
        "max_gib": 80.0,
        "pairs": 15,
    },
    "cpu": {
        "model": Model(8, 8, 8, 64, torch.float32),
        "layers_per_region": [1, None],
        "pages": [16 << 10, 64 << 10, 2 * MIB],
        "orders": ["head", "token"],
        "lengths": [1024, 4096, 16384],
        "batches": [1, 8],
        "queries": [1],
        "budget_s": 240.0,
        "max_gib": 6.0,
        "pairs": 21,
    },
}


def measure_layouts(args: argparse.Namespace, bench: Bench, lengths: Lengths) -> list[Json]:
    """Per layout of the full model: tails and cover of a trace's sequences, and growth."""
    model = bench.model
    spec = LayerSpec(model.kv_heads, model.head_dim, model.dtype)
    rows = []
    for choice in layouts(args):
        layout = make_layout(
            [spec] * model.layers,
            slots=1,
            max_tokens=int(lengths.max()),
            page_bytes=choice.page_bytes,
            order=choice.order,
            layers_per_region=choice.layers_per_region,
            tiles=bench.tiles,
        )
        found = footprint(layout.regions, choice.page_bytes, bench.tiles, lengths)
        growth = bench.growth(choice, min(args.growth_tokens, max(args.lengths)))
        rows.append(asdict(choice) | found.as_json() | {"growth": growth})
    return rows


def measure_grid(
    args: argparse.Namespace, bench: Bench, kernels: dict[Kernel, Prepare], bandwidth: float
) -> Json:
    """Every cell for which there is time and memory; what was left out is listed."""
    budget = Budget(args.budget_s)
    cells: list[Json] = []
    errors: list[Json] = []
    failed: list[Json] = []
    no_memory: list[str] = []
    for choice in layouts(args):
        sound: dict[Kernel, Prepare] = {}
        for kernel, prepare in kernels.items():
            if not fits(kernel, choice) or not budget.allows(f"{name_of(choice)} {kernel.label}"):
                continue
            try:
                error = bench.verify(choice, kernel, prepare)
            except FAILURES as problem:
                failed.append(asdict(choice) | {"kernel": kernel.label, "why": str(problem)})
                continue
            sound[kernel] = prepare
            errors.append(asdict(choice) | {"kernel": kernel.label, "relative_error": error})
        for point in points(args):
            name = name_of(choice, point)
            if bench.needed_bytes(choice, point) > bench.max_bytes:
                no_memory.append(name)
                continue
            if not sound or not budget.allows(name):
                continue
            try:
                memory, pairs = bench.measure(choice, point, sound)
            except FAILURES as problem:
                failed.append(asdict(choice) | asdict(point) | {"why": str(problem)})
                continue
            read = point.batch * point.length * bench.model.token_bytes()
            for kernel, pair in pairs.items():
                cells.append(
                    asdict(choice)
                    | asdict(point)
                    | {"kernel": kernel.label, "rotation": bench.rotation(point)}
                    | asdict(pair)
                    | {"floor_us": read / bandwidth * 1e6, "memory": memory}
                )
    return {
        "cells": cells,
        "relative_errors": errors,
        "failed": failed,
        "cut_for_time": budget.cut,
        "cut_for_memory": no_memory,
        "seconds": budget.spent_s,
    }


# Command line -------------------------------------------------------------------------------------


def layer_counts(text: str) -> list[int | None]:
    return [None if part == "all" else n for part in text.split(",") for n in _counts_or_all(part)]


def _counts_or_all(part: str) -> list[int]:
    return [0] if part == "all" else counts(part)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Model]:
    cli = parser("bench.layout", __doc__)
    cli.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    cli.add_argument("--layers-per-region", type=layer_counts, metavar="LIST", help="1,2,4,8,all")
    cli.add_argument("--pages", type=sizes, metavar="SIZES", help="such as 2MiB,32MiB")
    cli.add_argument("--orders", type=lambda text: text.split(","), help="token,head")
    cli.add_argument("--lengths", type=counts, help="such as 1K,64K")
    cli.add_argument("--batches", type=counts, help="such as 1,8,64")
    cli.add_argument("--queries", type=counts, help="1 is decode; more is a prefill chunk")
    cli.add_argument("--kernels", type=lambda text: text.split(","), help="default: all found")
    cli.add_argument("--layers", type=int, help="of the model")
    cli.add_argument("--heads", type=int)
    cli.add_argument("--kv-heads", type=int)
    cli.add_argument("--head-dim", type=int)
    cli.add_argument("--dtype", choices=sorted(DTYPES))
    cli.add_argument("--tiles", type=counts, help="kernel tiles that reads are covered up to")
    cli.add_argument("--pairs", type=int, help="timings of each side")
    cli.add_argument("--budget-s", type=float, help="seconds after which the grid is cut")
    cli.add_argument("--max-gib", type=float, help="memory that a cell may take")
    cli.add_argument("--growth-tokens", type=int, default=4096, help="whose calls are counted")
    cli.add_argument("--trace", type=Path, help="csv or csv.gz: TIMESTAMP,ContextTokens,...")
    cli.add_argument("--save", action="store_true", help="write bench/results/<device>/layout.json")
    args = cli.parse_args(argv)
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    default = DEFAULTS[args.device]
    model: Model = default["model"]
    for key, value in default.items():
        if key != "model" and getattr(args, key) is None:
            setattr(args, key, value)
    given = {
        key: getattr(args, key)
        for key in ("layers", "heads", "kv_heads", "head_dim")
        if getattr(args, key) is not None
    }
    if args.dtype is not None:
        given["dtype"] = DTYPES[args.dtype]
    return args, replace(model, **given)


def main(argv: Sequence[str] | None = None) -> int:
    args, model = parse(argv)
    kernels, missing = load_kernels(args.device, model.dtype, args.kernels)
    for label, reason in missing.items():
        print(f"no {label}: {reason}")
    tiles = args.tiles or DEFAULT_TILES[args.device]
    max_bytes = min(int(args.max_gib * 2**30), free_bytes(args.device))
    bench = Bench(args.device, model, tiles, args.pairs, max_bytes)
    lengths = draw_lengths() if args.trace is None else read_lengths(args.trace)
    layout_rows = measure_layouts(args, bench, lengths)
    with torch.inference_mode():
        bandwidth = copy_bandwidth(args.device)
        print(f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s, read plus written")
        grid = measure_grid(args, bench, kernels, bandwidth)
    bench.close()
    print_grid(args, grid)
    print_layouts(args, grid, layout_rows)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    settings |= {"model": model.as_json(), "tiles": list(tiles)}
    results = {
        "copy_bandwidth_bytes_per_s": bandwidth,
        "last_level_cache_bytes": bench.cache_bytes,
        "max_bytes": max_bytes,
        "kernels": [kernel.label for kernel in kernels],
        "missing_kernels": missing,
        "trace": {
            "source": args.trace.name if args.trace else "synthetic log-normal draw",
            "requests": len(lengths),
            "mean_tokens": float(lengths.mean()),
            "layouts": layout_rows,
        },
        **grid,
    }
    document = report("layout", settings, results)
    if args.json:
        write_json(args.json, document)
    if args.save:
        write_json(RESULTS / device_slug(args.device) / "layout.json", document)
    return 1 if grid["failed"] or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main())
