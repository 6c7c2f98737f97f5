"""The tables of the layout benchmark."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from bench.common import Json, print_table, short_bytes
from bench.layout_choice import choice_of
from bench.layout_points import LayoutChoice, Point, layouts, points


def print_grid(args: argparse.Namespace, grid: Json) -> None:
    """Per kernel: the ratios of every layout at every point, and what the ordinary side takes."""
    columns = points(args)
    for label in dict.fromkeys(cell["kernel"] for cell in grid["cells"]):
        cells = [cell for cell in grid["cells"] if cell["kernel"] == label]
        rows = []
        for choice in layouts(args):
            ratios = {_point(c): f"{c['ratio']:.2f}" for c in cells if _is(c, choice)}
            if ratios:
                rows.append([*_names(choice), *(ratios.get(point, "-") for point in columns)])
        header = ["order", "layers/region", "page", *(p.name for p in columns)]
        print_table(f"{label}: ordinary time / virtual time (1 is no cost)", header, rows)
        rows = []
        for point in columns:
            found = [cell for cell in cells if _point(cell) == point]
            if found:
                ordinary = statistics.median(cell["base_us"] for cell in found)
                floor = found[0]["floor_us"]
                rows.append([point.name, ordinary, floor, floor / ordinary])
        print_table(
            f"{label}: one layer on ordinary tensors, us (floor: K and V at copy bandwidth)",
            ["batch x length", "ordinary", "floor", "floor / ordinary"],
            rows,
        )


def print_layouts(args: argparse.Namespace, grid: Json, layout_rows: Sequence[Json]) -> None:
    """Per layout: speed over all cells, waste on the trace, calls; then what was left out."""
    rows = []
    for row, choice in zip(layout_rows, layouts(args), strict=True):
        ratios = [cell["ratio"] for cell in grid["cells"] if _is(cell, choice)]
        growth = row["growth"]
        rows.append(
            [
                *_names(choice),
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                f"{min(ratios):.2f}" if ratios else "-",
                row["live_share"],
                row["cover_share"],
                *(growth["driver_calls"][op] for op in ("create", "map", "set_access")),
                growth["ensure_ms"],
            ]
        )
    tokens = layout_rows[0]["growth"]["tokens"]
    print_table(
        "layouts: ratios over all cells; live / physical and cover / physical of the trace's "
        f"sequences;\ndriver calls and time of ensure({tokens}) on new pages, all layers",
        [
            *("order", "layers/region", "page", "median", "worst", "live", "cover"),
            *("create", "map", "access", "ms"),
        ],
        rows,
    )
    for what in ("failed", "cut_for_time", "cut_for_memory"):
        if grid[what]:
            shown = "; ".join(str(item) for item in grid[what][:6])
            print(f"{what}: {len(grid[what])}: {shown}{' ...' if len(grid[what]) > 6 else ''}")


def print_suggestion(suggestion: Json) -> None:
    """The front of speed against waste, and the layout to take."""
    chosen = suggestion["choice"]
    rows = [
        [
            *_names(choice_of(row)),
            *(f"{row[what]:.3f}" for what in ("speed", "worst", "live_share")),
            "suggested" if row == chosen else "",
        ]
        for row in _and(suggestion["front"], chosen)
    ]
    print_table(
        f"the front of speed against waste over the {len(suggestion['compared'])} cells that all "
        f"compared layouts have;\nsuggested: {suggestion['reason']}",
        ["order", "layers/region", "page", "speed", "worst", "live / physical", ""],
        rows,
    )


def _and(front: Sequence[Json], chosen: Json | None) -> list[Json]:
    """The front and what was chosen, which noise may have put beside it."""
    return [*front] if chosen is None or chosen in front else [*front, chosen]


def _point(cell: Json) -> Point:
    return Point(cell["length"], cell["batch"], cell["queries"])


def _names(choice: LayoutChoice) -> list[str]:
    return [choice.order, str(choice.layers_per_region or "all"), short_bytes(choice.page_bytes)]


def _is(cell: Json, choice: LayoutChoice) -> bool:
    return all(cell[key] == value for key, value in asdict(choice).items())
