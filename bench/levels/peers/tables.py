"""Tables, targets and the plot of the peers level, from its results."""

from __future__ import annotations

from typing import Any

from bench.common import Json, Target
from bench.levels.repeat import cell
from bench.levels.table import Table

# Of the CPU's settings: our seconds to theirs, at least.
_LIMITS = {
    "equal": {"generate_batch": 4.0, "padded": 1.0},
    "trace": {"generate_batch": 4.0, "padded": 1.5},
}
_OURS = "vattn"


def tables(results: Json) -> list[Table]:
    """Of whatever has been measured."""
    made = []
    for workload in results.get("workloads", []):
        rows = _rows(results, workload["workload"])
        made.append(_throughput(workload, rows))
        if workload["generate_batch_tried"]:
            made.append(_tried(workload))
    return made


def _rows(results: Json, workload: str) -> list[Json]:
    return [row for row in results.get("throughput", []) if row["workload"] == workload]


def _throughput(workload: Json, rows: list[Json]) -> Table:
    versions = {
        name: told["version"] for name, told in workload["sides"].items() if "version" in told
    }
    note = "Repeats are rounds of other prompts; the range where they differ by over 10%."
    if versions:
        note += " " + ", ".join(f"{name} {version}" for name, version in versions.items())
    return Table(
        f"{workload['workload']}: {workload['lengths']}",
        ["side", "out tok/s", "requests/min", "vattn is x", "rounds", "equal texts"],
        [
            [
                *(row["side"], row["output_throughput"], 60 * row["request_throughput"]),
                *(cell(row["ratio"]), len(row["seconds"])),
                f"{row['equal_texts']}/{row['compared_texts']}",
            ]
            for row in rows
        ],
        note=note,
    )


def _tried(workload: Json) -> Table:
    keys = ("page_size", "max_batch_tokens", "max_requests_per_batch")
    return Table(
        f"{workload['workload']}: settings of generate_batch tried",
        [*keys, "out tok/s", ""],
        [
            [*(row[key] for key in keys), row.get("tokens_per_s"), row.get("why", "")]
            for row in workload["generate_batch_tried"]
        ],
    )


def targets(settings: Json, results: Json) -> list[Target]:
    """Of the workloads that were measured on a CPU; answers have to be right anywhere."""
    found = []
    for workload in results.get("workloads", []):
        name = workload["workload"]
        rows = {row["side"]: row for row in _rows(results, name)}
        if _OURS not in rows:
            continue
        for side, limit in _LIMITS[name].items() if settings["device"] == "cpu" else ():
            ratio = (rows.get(side, {}).get("ratio") or {}).get("ratio")
            found.append(Target(f"{name}: throughput over {side}", ratio, limit, "x", True))
        ours = rows[_OURS]
        share = ours["equal_texts"] / ours["compared_texts"]
        note = "rounding decides between tokens that are as likely" if share < 1 else ""
        if settings["dtype"] == "float32":
            what = f"{name}: texts equal to generate's"
            found.append(Target(what, share, 1, "", at_least=True, note=note))
    return found


def draw(figure: Any, results: Json) -> bool:
    """Tokens per second of every side, a panel for each workload."""
    workloads = [
        w["workload"] for w in results.get("workloads", []) if _rows(results, w["workload"])
    ]
    if not workloads:
        return False
    axes = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axis, name in zip(axes, workloads, strict=True):
        rows = _rows(results, name)[::-1]
        colors = ["tab:blue" if row["side"] == _OURS else "tab:gray" for row in rows]
        axis.barh([r["side"] for r in rows], [r["output_throughput"] for r in rows], color=colors)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("generated tokens/s", fontsize=8)
        axis.tick_params(labelsize=7)
    return True
