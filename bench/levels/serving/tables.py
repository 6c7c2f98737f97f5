"""Tables and the plot of the serving level, from its results."""

from __future__ import annotations

from typing import Any

from bench.common import Json
from bench.levels.block_sweep import blocks_table
from bench.levels.repeat import cell
from bench.levels.table import Table

_COLORS = {"contiguous": "tab:blue", "paged": "tab:orange"}


def tables(results: Json) -> list[Table]:
    """Of whatever has been measured."""
    made = []
    if results.get("loads"):
        made.append(_loads(results["loads"]))
    if results.get("rates"):
        made.append(_rates(results["rates"]))
    if results.get("pairs"):
        made.append(_ratios(results["pairs"]))
    if results.get("blocks"):
        made.append(blocks_table(results["blocks"]))
    return made


def _loads(loads: list[Json]) -> Table:
    rows: list[list[object]] = []
    for load in loads:
        offline, limits = load["offline_request_throughput"], load["goodput_limits_ms"]
        rows.append(
            [
                *(load["load"], load["source"], load["num_prompts"], load["arrivals"]),
                *(offline.get("contiguous"), offline.get("paged")),
                ", ".join(f"{name} {limit:.3g} ms" for name, limit in limits.items()),
            ]
        )
    return Table(
        "loads; requests per second offline, on each side; limits of goodput",
        ["load", "lengths", "requests", "arrivals", "contiguous", "paged", "limits"],
        rows,
    )


def _rates(rates: list[Json]) -> Table:
    keys = (
        *("request_throughput", "request_goodput", "output_throughput"),
        *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms"),
        "p99_e2el_ms",
    )
    return Table(
        "open loop: requests per second asked for and served, and latencies from the moment due",
        [
            *("load", "of capacity", "side", "req/s due", "req/s", "goodput", "out tok/s"),
            *("TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "ITL p99", "E2EL p99"),
            *("cached", "slip max ms"),
        ],
        [
            [
                *(r["load"], r["load_factor"], r["side"], r["request_rate"]),
                *(r[key] for key in keys),
                f"{r['cached_tokens'] / max(1, r['total_input_tokens']):.0%}",
                r["schedule_slip_ms"]["max"],
            ]
            for r in rates
        ],
    )


def _ratios(pairs: list[Json]) -> Table:
    columns = {
        "TTFT p50": "median_ttft_ms",
        "TTFT p99": "p99_ttft_ms",
        "TPOT p50": "median_tpot_ms",
        "ITL p99": "p99_itl_ms",
        "E2EL p50": "median_e2el_ms",
        "out tok/s": "output_throughput",
        "goodput": "request_goodput",
    }
    return Table(
        "paged / contiguous of latencies, contiguous / paged of rates: above 1, contiguous wins",
        ["load", "of capacity", *columns, "equal texts"],
        [
            [
                *(p["load"], p["load_factor"]),
                *(cell(p["ratios"].get(key)) for key in columns.values()),
                f"{p['equal_texts']}/{p['compared_texts']}",
            ]
            for p in pairs
        ],
        note="Medians over windows at the same arrivals; the range where they differ by over 10%.",
    )


def draw(figure: Any, results: Json) -> bool:
    """Time to the first token and goodput over the rate, a column for each load."""
    rates = results.get("rates", [])
    loads = list(dict.fromkeys(row["load"] for row in rates))
    if not loads:
        return False
    axes = figure.subplots(2, len(loads), squeeze=False, sharex="col")
    for column, load in enumerate(loads):
        top, bottom = axes[0][column], axes[1][column]
        for side, color in _COLORS.items():
            rows = [r for r in rates if r["load"] == load and r["side"] == side]
            rows.sort(key=lambda r: r["request_rate"])
            if not rows:
                continue
            due = [r["request_rate"] for r in rows]
            top.plot(due, [r["median_ttft_ms"] for r in rows], color=color, marker="o", label=side)
            if all(r["p99_ttft_ms"] is not None for r in rows):
                top.plot(due, [r["p99_ttft_ms"] for r in rows], color=color, ls="--", marker=".")
            if all(r["request_goodput"] is not None for r in rows):
                bottom.plot(due, [r["request_goodput"] for r in rows], color=color, marker="o")
        top.set_yscale("log")
        top.set_title(load, fontsize=9)
        bottom.set_xlabel("requests/s due", fontsize=8)
        bottom.set_ylim(0, 1.1 * bottom.get_ylim()[1] or 1)
        for axis in (top, bottom):
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TTFT ms, p50 and p99 (dashed)", fontsize=8)
    axes[1][0].set_ylabel("goodput, requests/s", fontsize=8)
    axes[0][0].legend(fontsize=7)
    return True
