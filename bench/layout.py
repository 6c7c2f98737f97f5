"""What a layout costs: attention time on virtual slots, page tails, tile cover and driver calls.

    python -m bench.layout                        # the grid of this machine's device
    python -m bench.layout --save                 # ... into bench/results/<device>/layout.json
    python -m bench.layout --trace conv.csv.gz    # lengths from a trace, for the waste

Each kernel runs on slots of a KVCache and on ordinary tensors (torch.empty, K and V apart, tokens
first on a GPU, heads first on a CPU, as their kernels like it best), taking turns and going round
enough layers that none is still in the last-level cache; on a GPU as captured graphs behind a head
start, so that no launch is timed. A ratio is ordinary / virtual, median over neighbouring pairs: 1
is no cost, below 1 the virtual side is slower. The floor is K and V once at the copy bandwidth
measured in this run. Before timing, each kernel is checked against float32 on ragged slots with NaN
beyond the tiles.

What decides comes first: with less time than the grid needs (--budget-s), its end is cut and
listed. The file is written as the grid goes. Suggested is the fastest layout whose live / physical
on the trace is at least 0.95; the front of speed against waste stands beside it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from bench.common import RESULTS, Json, Target, counts, parser, print_targets, sizes
from bench.device import copy_bandwidth, free_bytes
from bench.kernels import load_kernels
from bench.layout_cells import Bench
from bench.layout_choice import choice_of, suggest, targets
from bench.layout_grid import Grid
from bench.layout_points import LayoutChoice, Model, cells, layouts
from bench.layout_tables import print_grid, print_layouts, print_suggestion
from bench.partial import Partial
from bench.provenance import device_slug, gpu_missing
from bench.trace import Lengths
from bench.waste import draw_lengths, footprint, read_lengths
from vattn.kv.cache import DEFAULT_TILES
from vattn.kv.defaults import default_page_bytes, layout_default
from vattn.kv.layout import LayerSpec, make_layout
from vattn.kv.pool import open_driver

MIB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The published grid per kind of device; pages in the order in which they are worth knowing.
DEFAULTS: dict[str, Json] = {
    "cuda": {
        "model": Model(32, 32, 8, 128, torch.bfloat16),
        "layers_per_region": [1, 2, 4, 8, 16, None],
        "pages": [2 * MIB, 32 * MIB, 8 * MIB, 4 * MIB, 16 * MIB],
        "orders": ["token"],
        "lengths": [1024, 4096, 16384, 65536, 131072],
        "batches": [1, 8, 64, 256],
        "queries": [1, 512],
        "budget_s": 150.0,
        "max_gib": 64.0,
        "pairs": 15,
        "kernel_s": 0.15,
        "growth_tokens": 4096,
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
        "kernel_s": 2.0,
        "growth_tokens": 4096,
    },
}

# In seconds, to see that it runs.
SMALL: Json = {
    "layers_per_region": [1, None],
    "orders": ["token"],
    "lengths": [128],
    "batches": [2],
    "queries": [1, 4],
    "budget_s": 60.0,
    "max_gib": 1.0,
    "pairs": 2,
    "growth_tokens": 128,
}
SMALL_MODEL: Json = {"layers": 2, "heads": 2, "kv_heads": 2}


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
            layers_per_region=bench.per_region(choice),
            tiles=bench.tiles,
        )
        found = footprint(layout.regions, choice.page_bytes, bench.tiles, lengths)
        growth = bench.growth(choice, min(args.growth_tokens, max(args.lengths)))
        rows.append(asdict(choice) | found.as_json() | {"growth": growth})
    return rows


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
    cli.add_argument("--kernel-s", type=float, help="timings of a kernel in a cell, about")
    cli.add_argument("--budget-s", type=float, help="seconds after which the grid is cut")
    cli.add_argument("--max-gib", type=float, help="memory that a cell may take")
    cli.add_argument("--growth-tokens", type=int, help="whose calls are counted")
    cli.add_argument("--trace", type=Path, help="csv or csv.gz: TIMESTAMP,ContextTokens,...")
    cli.add_argument("--small", action="store_true", help="two cells a layout, for CI")
    cli.add_argument("--save", action="store_true", help="write bench/results/<device>/layout.json")
    args = cli.parse_args(argv)
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    default = DEFAULTS[args.device]
    model: Model = default["model"]
    if args.small:
        default = default | SMALL | {"pages": default["pages"][:1]}
        model = replace(model, **SMALL_MODEL)
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
    bench = Bench(args.device, model, tiles, args.pairs, max_bytes, args.kernel_s)
    lengths = draw_lengths() if args.trace is None else read_lengths(args.trace)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    settings |= {"model": model.as_json(), "tiles": list(tiles)}
    default = default_choice(args.device, model)
    saved = RESULTS / device_slug(args.device) / "layout.json" if args.save else None
    out = Partial(args.json or saved, "layout", settings, partial(targets_of, default))
    layout_rows = measure_layouts(args, bench, lengths)
    with torch.inference_mode():
        bandwidth = copy_bandwidth(args.device)
        print(f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s, read plus written")
        grid = Grid(bench, kernels, bandwidth, args.budget_s)
        out.results.update(
            copy_bandwidth_bytes_per_s=bandwidth,
            last_level_cache_bytes=bench.cache_bytes,
            max_bytes=max_bytes,
            kernels=[kernel.label for kernel in kernels],
            missing_kernels=missing,
            default=asdict(default),
            trace={
                "source": args.trace.name if args.trace else "synthetic log-normal draw",
                "requests": len(lengths),
                "mean_tokens": float(lengths.mean()),
                "layouts": layout_rows,
            },
            **grid.results,
        )

        def keep() -> None:
            out.set(suggestion=suggest(grid.results["cells"], layout_rows), **grid.results)

        grid.run(cells(args), keep)
        keep()
    bench.close()
    print_grid(args, grid.results)
    print_layouts(args, grid.results, layout_rows)
    print_suggestion(out.results["suggestion"])
    print_targets(out.targets)
    if args.json and saved is not None:
        saved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.json, saved)
    return 1 if grid.results["failed"] or not kernels else 0


def default_choice(device: str, model: Model) -> LayoutChoice:
    """The layout that a cache of this device has by default, as one of the grid's."""
    default = layout_default(torch.device(device))
    page_bytes = default_page_bytes(torch.device(device), open_driver(torch.device(device)))
    per_region = default.layers_per_region
    if per_region is None or per_region >= model.layers:
        per_region = None
    return LayoutChoice(default.order, per_region, page_bytes)


def targets_of(default: LayoutChoice, results: Json) -> list[Target]:
    """Of the results so far."""
    rows = [row for row in results["trace"]["layouts"] if choice_of(row) == default]
    return targets(default, results["cells"], rows[0]["live_share"] if rows else None)


if __name__ == "__main__":
    raise SystemExit(main())
