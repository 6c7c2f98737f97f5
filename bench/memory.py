"""What the memory manager wastes, and how often it calls the driver, by layout. No model, no GPU.

    python -m bench.memory --trace conv.csv.gz    # the first 256 requests at full length
    python -m bench.memory                        # lengths drawn like those of the trace
    python -m bench.memory --small                # the same in a second, to see that it runs

All sequences are open at once in a KVCache of Llama-3-8B's shape. Each is admitted with its prompt
and grows by a token a step to its full length, as a server's would. Then

    live share   bytes of K and V / bytes of the pages with at least one token in them
    cover        pages beyond the last token, for kernels that read whole tiles; counted apart

and the calls that it took. ``cuda`` is the real driver on the fake libcuda with nothing behind its
pages, so the full size fits anywhere. ``host`` pages are real memory, zeroed when they are created,
so there a cell has the layers of one region (one layer in head order) instead of all: every region
is laid out alike, so shares are those of the full model, and calls are multiplied. Cells beyond
``--host-bytes`` are computed by the formula that all the others are checked against.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import vattn
from bench.common import (
    Json,
    Target,
    counts,
    parser,
    print_table,
    print_targets,
    report,
    short_bytes,
    sizes,
    write_json,
)
from bench.fake import fake_gpu, open_fake_driver
from bench.trace import Trace, open_trace
from bench.waste import footprint
from vattn import _core
from vattn.config import format_bytes, parse_bytes
from vattn.kv.cache import DEFAULT_TILES
from vattn.kv.defaults import DEFAULTS
from vattn.kv.layout import LayerSpec, Order, make_layout

KV_HEADS, HEAD_DIM, DTYPE = 8, 128, torch.bfloat16  # Llama-3-8B, which has 32 layers
CALLS = ("create", "map", "set_access", "unmap", "destroy")
Calls = dict[str, int]


@dataclass(frozen=True)
class Cell:
    """One layout on one driver."""

    driver: str  # "cuda" on the fake, or "host"
    order: Order
    layers_per_region: int
    page_bytes: int
    default: bool = False  # what a user gets who asks for nothing

    @property
    def device(self) -> str:
        return "cuda" if self.driver == "cuda" else "cpu"


class Sequences:
    """A cache with every sequence of a trace in it."""

    def __init__(self, pool: vattn.PagePool, cell: Cell, layers: int, trace: Trace) -> None:
        self.pool = pool
        self.trace = trace
        self.cache = vattn.KVCache(
            *(layers, KV_HEADS, HEAD_DIM, DTYPE),
            max_seqs=len(trace),
            max_tokens=int(trace.total.max()),
            pool=pool,
            order=cell.order,
            layers_per_region=min(cell.layers_per_region, layers),
        )
        self._made = self._calls()

    def _calls(self) -> Calls:
        calls = self.pool.driver_calls()
        return {op: calls[op] for op in CALLS}

    def _since(self) -> Calls:
        """Driver calls since this was asked last."""
        before, self._made = self._made, self._calls()
        return {op: self._made[op] - before[op] for op in CALLS}

    def admit(self) -> Calls:
        for tokens in self.trace.context.tolist():
            self.cache.ensure(self.cache.open(expected_tokens=tokens), tokens)
        return self._since()

    def decode(self) -> Calls:
        """One token a step for whoever is not at its end."""
        lengths, ends = self.trace.context.copy(), self.trace.total
        while len(running := np.flatnonzero(lengths < ends)):
            lengths[running] += 1
            self.cache.ensure_many(running.astype(np.int32), lengths[running].astype(np.int32))
        return self._since()

    def end(self) -> Calls:
        """Releases everything and gives it back.

        Raises:
            AssertionError: pages are left.
        """
        for slot in range(len(self.trace)):
            self.cache.release(slot)
        self.cache.check()
        self.cache.trim()
        self.cache.check()
        left = self.pool.stats()
        assert (left.created_bytes, left.used_bytes) == (0, 0), left
        calls = self._since()
        self.cache.close()
        return calls


def measure(cell: Cell, layers: int, trace: Trace, driver: _core.Driver) -> Json:
    """Fills a cache with ``layers`` layers, and checks the formula against it.

    Raises:
        AssertionError: the formula is wrong, or pages are left.
    """
    budget = 2 * int(trace.total.sum()) * layers * 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    runs = layers * 2 * KV_HEADS
    budget += len(trace) * runs * 2 * cell.page_bytes
    pool = vattn.PagePool(
        cell.device, driver=driver, page_bytes=cell.page_bytes, budget_bytes=budget
    )
    sequences = Sequences(pool, cell, layers, trace)
    calls = {"admission": sequences.admit(), "decode": sequences.decode()}
    stats = sequences.cache.stats()
    expected = footprint(
        sequences.cache.layout.regions, cell.page_bytes, DEFAULT_TILES[cell.device], trace.total
    )
    found = (stats.token_bytes, stats.live_bytes, stats.cover_bytes)
    assert found == (expected.token_bytes, expected.live_bytes, expected.cover_bytes), found
    sequences.cache.check()
    calls["end"] = sequences.end()
    return expected.as_json() | {"calls": calls, "measured_layers": layers}


def compute(cell: Cell, layers: int, trace: Trace) -> Json:
    """What :func:`measure` would find of bytes."""
    layout = make_layout(
        [LayerSpec(KV_HEADS, HEAD_DIM, DTYPE)] * layers,
        slots=1,
        max_tokens=int(trace.total.max()),
        page_bytes=cell.page_bytes,
        order=cell.order,
        layers_per_region=min(cell.layers_per_region, layers),
        tiles=DEFAULT_TILES[cell.device],
    )
    tiles = DEFAULT_TILES[cell.device]
    return footprint(layout.regions, cell.page_bytes, tiles, trace.total).as_json()


def elsewhere(cell: Cell, layers: int, whole: Trace, sequences: int) -> Json:
    """The live share of all requests of a trace, and of every stretch of so many of them."""
    stretches = [
        compute(cell, layers, whole.part(start, sequences))["live_share"]
        for start in range(0, len(whole) - sequences + 1, sequences)
    ]
    return {
        "live_share_of_all": compute(cell, layers, whole)["live_share"],
        "live_share_low": min(stretches),
        "live_share_high": max(stretches),
        "stretches": len(stretches),
        "stretches_at_least_0.95": sum(share >= 0.95 for share in stretches),
    }


def run_cell(cell: Cell, args: argparse.Namespace, trace: Trace) -> Json:
    """Measures a cell in full, measures one of its regions, or computes it."""
    if cell.driver == "cuda":
        with fake_gpu() as fake:
            found = measure(cell, args.layers, trace, open_fake_driver())
            gc.collect()
            found["api_calls"] = fake.calls()
        return asdict(cell) | found
    layers = 1 if cell.order == "head" else min(cell.layers_per_region, args.layers)
    expected = compute(cell, layers, trace)
    if expected["live_bytes"] + expected["cover_bytes"] > args.host_bytes:
        return asdict(cell) | expected | {"calls": None, "measured_layers": 0}
    driver = _core.host_driver()
    found = measure(cell, layers, trace, driver)
    gc.collect()
    assert driver.physical_bytes() == 0, "host pages are left"
    return asdict(cell) | found


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """The default layouts first, then the grid around them."""
    cells = []
    for name, device in (("cuda", "cuda"), ("host", "cpu")):
        default = DEFAULTS[device]
        page = args.cuda_pages[0] if name == "cuda" else _core.host_driver().default_page_bytes()
        per_region = default.layers_per_region or args.layers
        cells.append(Cell(name, default.order, per_region, page, default=True))
    for order in ("token", "head"):
        # In head order every head has runs of its own, however many layers share a region.
        groups = args.layers_per_region if order == "token" else [args.layers]
        for per_region in groups:
            cells += [Cell("cuda", order, per_region, page) for page in args.cuda_pages]
            cells += [Cell("host", order, per_region, page) for page in args.host_pages]
    known = {(c.driver, c.order, c.layers_per_region, c.page_bytes): c for c in reversed(cells)}
    return list(reversed(known.values()))


def calls_per(found: Json, args: argparse.Namespace, trace: Trace) -> tuple[str, str, str]:
    """Cells of a table: map and set-access per admission, both per 1000 tokens decoded."""
    calls = found["calls"]
    if calls is None:
        return "-", "-", "-"
    scale = args.layers / found["measured_layers"]
    admitted, decoded = calls["admission"], calls["decode"]
    per_1000 = 1000 * scale / max(1, int(trace.generated.sum()))
    return (
        f"{scale * admitted['map'] / len(trace):.1f}",
        f"{scale * admitted['set_access'] / len(trace):.1f}",
        f"{per_1000 * (decoded['map'] + decoded['set_access']):.1f}",
    )


def print_results(results: Sequence[Json], args: argparse.Namespace, trace: Trace) -> None:
    rows = []
    for r in results:
        name = f"{r['driver']}{' (default)' if r['default'] else ''}"
        layout = [name, r["order"], r["layers_per_region"], short_bytes(r["page_bytes"])]
        shares = [f"{r['live_share']:.4f}", f"{r['cover_share']:.4f}"]
        sizes = [format_bytes(r["live_bytes"]), r["measured_layers"] or "computed"]
        rows.append([*layout, *shares, *calls_per(r, args, trace), *sizes])
    print_table(
        "waste by layout: K and V / live pages, cover / live pages; driver calls",
        [
            *("driver", "order", "layers/region", "page", "live share", "cover"),
            *("map/admission", "access/admission", "calls/1000 tokens", "live", "layers"),
        ],
        rows,
    )


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.memory", __doc__)
    cli.add_argument("--small", action="store_true", help="16 short sequences, for CI")
    cli.add_argument("--trace", type=Path, metavar="FILE", help="lengths (csv or csv.gz)")
    cli.add_argument("--sequences", type=int, default=256)
    cli.add_argument("--layers", type=int, default=32)
    cli.add_argument("--layers-per-region", type=counts, default=[1, 2, 4, 8, 32])
    cli.add_argument("--cuda-pages", type=sizes, default=[2 << 20, 4 << 20])
    cli.add_argument("--host-pages", type=sizes, default=[4 << 10, 16 << 10, 64 << 10, 2 << 20])
    cli.add_argument(
        "--host-bytes", type=parse_bytes, default=3 << 30, help="most memory of a host cell"
    )
    args = cli.parse_args(argv)
    trace = open_trace(args.trace)
    if args.small:
        args.sequences, args.layers = min(args.sequences, 16), min(args.layers, 8)
        args.layers_per_region = [n for n in args.layers_per_region if n <= args.layers]
        args.host_bytes = min(args.host_bytes, 16 << 20)
        trace = trace.scaled(8)
    whole, trace = trace, trace.first(args.sequences)
    results = [run_cell(cell, args, trace) for cell in make_cells(args)]
    print_results(results, args, trace)
    targets = []
    for r in [r for r in results if r["default"]]:
        cell = Cell(**{name: r[name] for name in Cell.__dataclass_fields__})
        r |= elsewhere(cell, args.layers, whole, args.sequences)
        note = (
            f"cover {r['cover_share']:.3f}; {r['live_share_of_all']:.3f} over all {len(whole)} "
            f"requests; {r['live_share_low']:.3f}-{r['live_share_high']:.3f} by {args.sequences}"
        )
        name = f"live share, {r['driver']}, default layout"
        targets.append(Target(name, r["live_share"], 0.95, "", at_least=True, note=note))
    print_targets([] if args.small else targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        found = {"trace": trace.as_json(), "cells": results}
        write_json(args.json, report("memory", settings, found, targets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
