"""The parts of the memory level, each into the list of results that has its name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from bench.common import Json
from bench.levels.fold import grouped
from bench.levels.memory import batch as memory_batch
from bench.levels.memory import calls as memory_calls
from bench.levels.memory import paged as memory_paged
from bench.levels.memory import rate as memory_rate
from bench.levels.memory import steps as memory_steps
from bench.levels.memory.cells import GRANULARITY, Cell, elsewhere, on_gpu, waste_row
from bench.levels.memory.shapes import (
    ALL,
    PUBLISHED_LAYOUT,
    PUBLISHED_MOST,
    PUBLISHED_PAGES,
    KVShape,
    Regions,
    implied,
    shorter,
    stretched,
)
from bench.partial import Partial
from bench.trace import Trace
from bench.vmm_ops import measure_ops
from vattn import _core
from vattn.kv.defaults import layout_default

DEVICE_BYTES = 80 << 30  # of the GPU that the paper had
DEVICE_SHARE = 0.9


def default_regions(device: str) -> Regions:
    """What a user gets on a device who asks for nothing."""
    found = layout_default(torch.device(device))
    page = GRANULARITY if device == "cuda" else _core.host_driver().default_page_bytes()
    return Regions(found.order, found.layers_per_region or ALL, found.page_bytes or page)


def grid(args: argparse.Namespace) -> Iterator[Regions]:
    """Layouts and pages of the CUDA driver."""
    for page in args.pages:
        yield Regions("token", 1, page, apart=True)
    for layers in args.layers_per_region:
        for page in args.pages:
            yield Regions("token", layers, page)
    for page in args.pages:
        yield Regions("head", ALL, page)


def batch_layouts(args: argparse.Namespace, *, is_first: bool) -> Iterator[Regions]:
    """Of the grid; for other shapes than the first, the published layout and the default one."""
    few = {PUBLISHED_LAYOUT, default_regions("cuda").layout_name}
    for regions in grid(args):
        if is_first or args.kv_budget == "implied":
            if regions.order != "head" and regions.layers_per_region in (1, 8, ALL):
                yield regions  # of the others the waste says it
        elif regions.layout_name in few and regions.page_bytes in PUBLISHED_PAGES:
            yield regions


def lengths_of(args: argparse.Namespace, shape: KVShape, trace: Trace) -> Trace:
    """The requests that this shape gets.

    Raises:
        ValueError: the published figures imply nothing of it, or every request is too long.
    """
    if args.kv_budget != "implied":
        return trace
    return shorter(stretched(trace, implied(shape)[1]), args.max_model_len)


def waste_cells(args: argparse.Namespace, shape: KVShape) -> list[Cell]:
    """The defaults first, then for the first shape all around them."""
    cells = [
        Cell("cuda", default_regions("cuda"), default=True),
        Cell("host", default_regions("cpu"), default=True),
    ]
    if shape.name != args.shapes[0]:
        return [*cells[:1], Cell("cuda", Regions("token", 1, GRANULARITY, apart=True))]
    cells += [Cell("cuda", regions) for regions in grid(args)]
    cells += [Cell("host", Regions("head", ALL, page)) for page in args.host_pages]
    known = {(cell.driver, cell.regions): cell for cell in reversed(cells)}
    return list(reversed(known.values()))


def _append(out: Partial, name: str, rows: Iterable[Json]) -> None:
    """Those of one layout as one, which keeps the file small."""
    for row in grouped(rows, "shape", "driver", "layout"):
        out.append(name, row)


def _waste(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    for shape in shapes:
        lengths = lengths_of(args, shape, trace)
        part = lengths.first(min(args.sequences, len(lengths)))
        rows = []
        for cell in waste_cells(args, shape):
            if args.budget.allows(f"waste of {shape.name}, {cell.driver}, {cell.regions}"):
                row = waste_row(cell, shape, part, args.device, args.host_bytes)
                if cell.default and shape is shapes[0]:
                    row |= elsewhere(cell, shape, lengths, len(part))
                rows.append(row)
        if shape is not shapes[0]:  # the shares of blocks are those of the first
            _append(out, "waste", rows)
            continue
        most = args.max_model_len
        rows += [memory_paged.waste_row(shape, n, part, most) for n in args.block_tokens]
        mean = float(part.total.mean())
        preallocated = {
            "live_share": round(mean / most, 4),
            "cover_share": 0.0,
            "tail_bytes_per_request": round((most - mean) * shape.token_bytes),
        }
        rows.append({"shape": shape.name, "layout": "preallocated"} | preallocated)
        _append(out, "waste", rows)


def _batch(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    if args.kv_budget == "implied":
        pairs = {shape.name: list(PUBLISHED_MOST.get(shape.name, ())) for shape in shapes}
        out.set(published_most=pairs, published_pages=list(PUBLISHED_PAGES))
    for shape in shapes:
        budget, lengths = args.kv_budget, lengths_of(args, shape, trace)
        if budget == "implied":
            budget, _ = implied(shape)
        elif budget is None:
            budget = int(DEVICE_SHARE * DEVICE_BYTES) - shape.weight_bytes
        conditions = {
            "budget_bytes": budget,
            "mean_tokens": round(float(lengths.total.mean())),
            "left_out": len(trace) - len(lengths),
        }
        out.append("budgets", {"shape": shape.name} | conditions)
        common = (lengths, budget, args.max_model_len, args.stretches)
        rows = [
            memory_batch.most_in_regions(shape, regions, *common, args.device)
            for regions in batch_layouts(args, is_first=shape is shapes[0])
            if args.budget.allows(f"batch of {shape.name}, {regions}")
        ]
        rows += [memory_paged.most_in_blocks(shape, n, *common) for n in args.block_tokens]
        rows.append(memory_batch.most_whole_slots(shape, budget, args.max_model_len))
        _append(out, "batch", rows)


def compared() -> list[Regions]:
    """The published layout and ours."""
    return [Regions("token", 1, GRANULARITY, apart=True), default_regions("cuda")]


def _calls(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    shape = shapes[0]
    for regions in compared():
        if args.budget.allows(f"calls of {shape.name}, {regions}"):
            few = (args.running, args.steps, args.device)
            _append(out, "calls", memory_calls.serve(shape, regions, trace, *few))


def _rate(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    for shape in shapes:
        rows = [
            memory_rate.decode_row(shape, regions, trace, batch, args.steps, args.bandwidth)
            for regions in compared()
            for batch in args.batches
        ]
        _append(out, "rate", rows)
        out.append("prefill", memory_rate.prefill_row(shape, args.flops))


def _tables(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    del trace
    out.set(most_tokens=args.most_tokens)
    for sequences in args.table_sequences:
        cells = [
            (context, block_tokens)
            for context in args.table_contexts
            for block_tokens in args.table_blocks
            if sequences * context <= args.most_tokens
        ]
        rows = [
            memory_steps.step_row(
                *(shapes[0], default_regions("cuda"), sequences, context, block_tokens),
                *(args.pairs, args.repeats, args.device),
            )
            for context, block_tokens in cells
            if args.budget.allows(f"tables of {sequences} x {context}, {block_tokens}")
        ]
        _append(out, "tables", rows)


def _latency(args: argparse.Namespace, out: Partial, shapes: list[KVShape], trace: Trace) -> None:
    del shapes, trace
    if args.device == "cpu":
        absent = {"latency of the driver's calls": "no GPU; published costs are used"}
        out.set(absent=out.results.get("absent", {}) | absent)
        return
    for run_pages in (1, 8, 64):
        work = partial(
            measure_ops, name="cuda", page_bytes=GRANULARITY, run_pages=run_pages, rounds=20
        )
        _append(out, "latency", [cost.as_json() for cost in on_gpu("cuda", GRANULARITY, work)])


Part = Callable[[argparse.Namespace, Partial, list[KVShape], Trace], None]
PARTS: dict[str, Part] = {
    "waste": _waste,
    "batch": _batch,
    "calls": _calls,
    "rate": _rate,
    "tables": _tables,
    "latency": _latency,
}
