"""Tables, best block sizes, targets and the plot of the kernel level, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bench.common import Json, Target, short_count
from bench.levels.kernels.grid import PHASES
from bench.levels.repeat import AGREEMENT, cell
from bench.levels.table import Table

# Closer to 1 than this is a tie.
TIE = 0.02
# What the project has set itself for a CPU: decode over the gather at its best block size.
LEAST_RATIO, LEAST_CONTEXT = 1.3, 512

_STYLES = ("-", "--", ":", "-.")


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def groups(rows: Sequence[Json]) -> Iterator[tuple[str, str, list[Json]]]:
    """Kernel, phase and the rows of both, in the order of the rows and of PHASES."""
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        for phase in PHASES:
            found = [row for row in rows if (row["kernel"], row["phase"]) == (kernel, phase)]
            if found:
                yield kernel, phase, found


def summarize(rows: Sequence[Json]) -> list[Json]:
    """Per kernel and phase: its best block size, and what paging costs at that size.

    Best is the lowest geometric mean of the time, over the cells that all sizes have. Times are
    taken relative to the same cell's contiguous one, measured in turn, so that a machine that slows
    down between cells favours no size; without such drift the order is that of plain times.
    ``wins``, ``ties`` and ``losses`` are of contiguous, over the cells.
    """
    return [_summary(kernel, phase, found) for kernel, phase, found in groups(rows)]


def _summary(kernel: str, phase: str, rows: Sequence[Json]) -> Json:
    every = block_sizes(rows)
    common = [row for row in rows if set(row["paged"]) == set(every)]
    means = {
        size: geometric_mean(row["paged"][size]["ratio"] for row in common)
        for size in (every if common else ())
    }
    ordinary = [row["ordinary"]["ratio"] for row in rows if row["ordinary"] is not None]
    out: Json = {
        "kernel": kernel,
        "phase": phase,
        "cells": len(rows),
        "ordinary": _round(geometric_mean(ordinary)) if ordinary else None,
        "paged": {size: _round(mean) for size, mean in means.items()},
        "best_block_tokens": None,
    }
    if not means:
        return out
    best = min(means, key=lambda size: means[size])
    ratios = [row["paged"][best]["ratio"] for row in rows if best in row["paged"]]
    return out | {
        "best_block_tokens": int(best),
        "ratio": _round(geometric_mean(ratios)),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "wins": sum(ratio > 1 + TIE for ratio in ratios),
        "ties": sum(abs(ratio - 1) <= TIE for ratio in ratios),
        "losses": sum(ratio < 1 - TIE for ratio in ratios),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def block_sizes(rows: Sequence[Json]) -> list[str]:
    """Those of any row, ascending; keys of JSON, so text."""
    return sorted({size for row in rows for size in row["paged"]}, key=int)


# Tables -------------------------------------------------------------------------------------------


def tables(results: Json) -> list[Table]:
    """Ratios per kernel and phase, then the best block sizes."""
    rows = results.get("rows", [])
    if not rows:
        return []
    found = [_ratios(results, kernel, phase, of) for kernel, phase, of in groups(rows)]
    found.append(_best(results, rows))
    if large := results.get("cut_for_memory"):
        found.append(Table("too large", ["cell", "why"], [[c["cell"], c["why"]] for c in large]))
    return found


def _ratios(results: Json, kernel: str, phase: str, rows: Sequence[Json]) -> Table:
    sizes = block_sizes(rows)
    floor = ["floor us"] if phase == "decode" else []
    header = ["shape", "batch", "context", "virtual us", *floor, "ordinary"]
    lines = []
    for row in rows:
        line = [row["shape"], row["batch"], short_count(row["context"]), _us(row["virtual_us"])]
        line += [_us(row["floor_us"])] if floor else []
        lines.append(
            [*line, cell(row["ordinary"]), *(cell(row["paged"].get(size)) for size in sizes)]
        )
    form = results.get("forms", {}).get(kernel, {}).get(phase, "contiguous")
    return Table(
        f"{kernel}, {phase}: time over that on virtual slots ({form})",
        [*header, *(f"blocks of {size}" for size in sizes)],
        lines,
        _agreement(rows) + _clock(rows),
    )


def _agreement(rows: Sequence[Json]) -> str:
    ratios = [
        ratio
        for row in rows
        for ratio in [row["ordinary"], *row["paged"].values()]
        if ratio is not None
    ]
    agree = sum(ratio["agrees"] for ratio in ratios)
    return (
        f"Above 1 contiguous virtual memory is faster. {agree} of {len(ratios)} ratios agree "
        f"within {AGREEMENT:.0%} over their repeats; the others have their range beside them."
    )


def _clock(rows: Sequence[Json]) -> str:
    plain = sum(row["clock"] == "events" for row in rows)
    if not plain:
        return ""
    return f" {plain} of {len(rows)} rows could not be captured: launches by the host count there."


def _us(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _best(results: Json, rows: Sequence[Json]) -> Table:
    lines = [
        [
            row["kernel"],
            row["phase"],
            row["best_block_tokens"],
            row.get("ratio"),
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}" if "ratio" in row else None,
            f"{row['wins']} / {row['ties']} / {row['losses']}" if "ratio" in row else None,
            row["ordinary"],
        ]
        for row in summarize(rows)
    ]
    note = (
        f"Means are geometric. A tie is within {TIE:.0%} of 1. Blocks are "
        f"{results.get('placement', 'shuffled')} over the pool; making block tables is not timed."
    )
    return Table(
        "the best block size of each kernel",
        [
            "kernel",
            "phase",
            "block tokens",
            "paged / virtual",
            "range",
            "contiguous wins / ties / loses",
            "ordinary / virtual",
        ],
        lines,
        f"{note} {results['scale']}" if results.get("scale") else note,
    )


# Targets ------------------------------------------------------------------------------------------


def targets(settings: Json, results: Json) -> list[Target]:
    """On a CPU: decode against gathering blocks of the size that is best for it."""
    if settings["device"] != "cpu" or "decode" not in settings["phases"]:
        return []
    rows = [
        row
        for row in results.get("rows", [])
        if row["phase"] == "decode" and row["context"] >= LEAST_CONTEXT
    ]
    found = [of for of in summarize(rows) if of["best_block_tokens"] is not None]
    return [
        Target(
            f"decode of {LEAST_CONTEXT} tokens and more, {of['kernel']} / contiguous",
            of["ratio"],
            LEAST_RATIO,
            "x",
            at_least=True,
            note=f"blocks of {of['best_block_tokens']}; geometric mean of {of['cells']} cells, "
            f"{of['ratio_low']:.2f} to {of['ratio_high']:.2f}",
        )
        for of in found
    ] or [Target(f"decode of {LEAST_CONTEXT} tokens and more", None, LEAST_RATIO, "x", True)]


# Plot ---------------------------------------------------------------------------------------------


def draw(figure: Any, results: Json) -> bool:
    """Ratios over context, or over batch where there is one context; a panel for each phase."""
    rows = results.get("rows", [])
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    if not phases:
        return False
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=True):
        _panel(axes, phase, [row for row in rows if row["phase"] == phase])
    return True


def _panel(axes: Any, phase: str, rows: Sequence[Json]) -> None:
    shape = _most(rows, lambda row: row["shape"])
    rows = [row for row in rows if row["shape"] == shape]
    by_batch = len({row["context"] for row in rows}) == 1 and len({r["batch"] for r in rows}) > 1
    x = "batch" if by_batch else "context"
    if not by_batch:
        batch = max(
            {row["batch"] for row in rows},
            key=lambda b: (len({row["context"] for row in rows if row["batch"] == b}), b),
        )
        rows = [row for row in rows if row["batch"] == batch]
    at = sorted({row[x] for row in rows})
    fixed = f"context {short_count(rows[0]['context'])}" if by_batch else f"batch {batch}"
    axes.set_title(f"{phase}, {shape}, {fixed}", fontsize=9)
    sizes = block_sizes(rows)
    for style, kernel in enumerate(dict.fromkeys(row["kernel"] for row in rows)):
        own = sorted((row for row in rows if row["kernel"] == kernel), key=lambda row: row[x])
        line = _STYLES[style % len(_STYLES)]
        for i, size in enumerate(sizes):
            points = [(row[x], row["paged"][size]["ratio"]) for row in own if size in row["paged"]]
            if points:
                axes.plot(*zip(*points, strict=True), f"C{i}o{line}", label=f"{kernel} {size}")
        points = [(row[x], row["ordinary"]["ratio"]) for row in own if row["ordinary"]]
        if points:
            label = f"{kernel} ordinary"
            axes.plot(*zip(*points, strict=True), f"{line}x", color="0.6", label=label)
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [short_count(value) for value in at])
    axes.set_xlabel("sequences" if by_batch else "tokens of context")
    axes.set_ylabel("time / that on virtual slots")
    axes.legend(fontsize=7)


def _most(rows: Sequence[Json], key: Callable[[Json], str]) -> str:
    """The key of most rows; of those with as many, the first."""
    keys = [key(row) for row in rows]
    return max(dict.fromkeys(keys), key=keys.count)
