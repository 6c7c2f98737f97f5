"""The README's GPU tables, as Markdown, from the results of gpu-check and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from bench.common import Json, short_bytes, short_count
from bench.report_files import StageFile

UNMEASURED = "Not yet measured on a GPU; `make gpu-check` measures it.\n"

Row = Sequence[object]
_SIGNS = {True: "at least", False: "at most"}
# What a row has to have to be shown.
_STEP = ("mode", "batch", "context", "floor_us", "ratio")
_SERVED = ("shape", "concurrency", "tokens_per_s")
_CALL = ("driver", "op", "page_bytes", "run_pages", "run_us_per_page", "single_us_per_page")
_OPS = ("create", "map", "set_access", "unmap")


def render(files: Sequence[StageFile], plots: Sequence[tuple[str, str]] = ()) -> str:
    """One GPU's tables and plots.

    Args:
        files: of its stages, at least one.
        plots: title and path of each plot.
    """
    parts = [f"### {files[0].gpu}\n"]
    for title, header, make in _TABLES:
        rows = [[*row, file.source] for file in files for row in make(file)]
        if rows:
            parts.append(f"{title}\n\n{table([*header, 'source'], rows)}")
    parts += [f"![{title}]({path})\n" for title, path in plots]
    return "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    else:
        text = str(value)
    return text.replace("|", "\\|")


# Rows of one stage's file -------------------------------------------------------------------------


def target_rows(file: StageFile) -> Iterator[Row]:
    """What was measured of what the project aims at."""
    for target in file.benchmark.get("targets") or ():
        measured, unit = target["measured"], target["unit"]
        if measured is None:
            continue
        space = "" if unit in ("", "x") else " "
        limit = f"{_SIGNS[target['at_least']]} {target['limit']:g}{space}{unit}"
        note = f"; {target['note']}" if target.get("note") else ""
        verdict = "met" if target["met"] else "**missed**"
        yield target["name"], f"{_cell(float(measured))}{space}{unit}{note}", limit, verdict


def test_rows(file: StageFile) -> Iterator[Row]:
    """What the stages of tests say of themselves."""
    if not file.benchmark and file.stage != "build":
        yield file.stage, file.document.get("note") or "passed"


def decode_rows(file: StageFile) -> Iterator[Row]:
    """The model's step and the engine's, against their floor."""
    for kind, name, key in (("model", "steps", "flow_us"), ("engine", "engine", "step_us")):
        for row in file.rows("decode", name, key, *_STEP):
            point = f"{row['batch']} x {short_count(row['context'])}"
            times = (row[key] / 1e3, row["floor_us"] / 1e3)
            yield kind, row["mode"], point, *times, f"{row['ratio']:.2f}x"


def served_rows(file: StageFile) -> Iterator[Row]:
    """Rates and latencies of requests, by how many run at a time."""
    nano = file.results.get("nano") if file.stage == "workload" else None
    served = file.rows("workload", "served", *_SERVED)
    for row in ([nano] if isinstance(nano, dict) else []) + served:
        quantiles = [(what, q) for what in ("ttft_ms", "tpot_ms") for q in ("p50", "p99")]
        latencies = (row.get(what, {}).get(q) for what, q in quantiles)
        name = "nano-vllm's" if row is nano else "closed loop"
        yield name, row["shape"], row["concurrency"], float(row["tokens_per_s"]), *latencies


def layout_rows(file: StageFile) -> Iterator[Row]:
    """The front of speed against waste; the layout to take is bold."""
    suggestion: Json = (file.results.get("suggestion") or {}) if file.stage == "layout" else {}
    for row in suggestion.get("front", ()):
        chosen = _layout(row) == _layout(suggestion.get("choice") or {})
        name = f"**{_layout(row)}**" if chosen else _layout(row)
        yield name, f"{row['speed']:.3f}x", f"{row['worst']:.3f}x", f"{row['live_share']:.3f}"


def _layout(row: Json) -> str:
    if not row:
        return ""
    per_region = row["layers_per_region"] or "all"
    return f"{row['order']} order, {per_region} a region, {short_bytes(row['page_bytes'])}"


def call_rows(file: StageFile) -> Iterator[Row]:
    """Each driver call by page size: in the longest run, page by page, beside a kernel."""
    operations = [row for row in file.rows("vmm", "operations", *_CALL) if row["driver"] == "cuda"]
    beside = (file.results.get("beside_a_kernel") or {}).get("calls", ())
    for op in _OPS:
        for page in sorted({row["page_bytes"] for row in operations if row["op"] == op}):
            row = max(
                (r for r in operations if (r["op"], r["page_bytes"]) == (op, page)),
                key=lambda r: r["run_pages"],
            )
            busy = [r for r in beside if (r["op"], r.get("page_bytes")) == (op, page)]
            waits = (f"{r['idle_us']:.0f} / {r['beside_us']:.0f}" for r in busy[:1])
            times = (float(row["run_us_per_page"]), float(row["single_us_per_page"]))
            yield op, short_bytes(page), row["run_pages"], *times, next(waits, None)


def launch_rows(file: StageFile) -> Iterator[Row]:
    """How long a launch takes beside another thread's calls."""
    for row in (file.results.get("beside_a_kernel") or {}).get("launches", ()):
        if isinstance(row, dict) and "median_us" in row:
            page = short_bytes(row["page_bytes"])
            yield row["what"], page, float(row["median_us"]), float(row["p99_us"])


def allocator_rows(file: StageFile) -> Iterator[Row]:
    """Where tensors' memory comes from: the step's median, the worst round's memory and calls."""
    training = file.rows("allocator-bench", "training", "way", "step_us", "ratio", "steady_calls")
    fragments = file.rows("allocator-bench", "fragments", "way", "ratio")
    pairs = [
        row
        for row in file.rows("allocator-bench", "pairs", "way", "bytes", "ns")
        if row["bytes"] == _PAIR_BYTES
    ]
    for way in dict.fromkeys(row["way"] for row in training):
        mine, scattered, cached = (
            [row for row in rows if row["way"] == way] for rows in (training, fragments, pairs)
        )
        step = statistics.median(us for row in mine for us in row["step_us"])
        yield (
            *(way, step / 1e3, _largest(mine, "ratio"), _largest(mine, "steady_calls")),
            *(_largest(scattered, "ratio"), _largest(cached, "ns")),
        )


def _largest(rows: Sequence[Json], key: str) -> float | None:
    """Of those that were measured."""
    return max((row[key] for row in rows if row[key] is not None), default=None)


_PAIR_BYTES = 4 << 20
_LAYOUTS = (
    "Layouts that no other beats in speed and in waste (speed: ordinary / virtual time of "
    "attention, the mean over the sweep; live: K/V bytes / physical bytes on a trace's lengths; "
    "bold is the one to take):"
)
_CALLS = (
    "Driver calls, microseconds: per page of a run; and per call of 16 pages, on an idle device / "
    "beside a running kernel:"
)
_ALLOCATORS = (
    "Training with tensors from PyTorch's allocator, from its expandable segments, and from vattn "
    "(memory: peak in use on the GPU / peak requested; calls: of the driver, in steps of one "
    "length; pair: `torch.empty` of 4 MiB and its end):"
)
_Make = Callable[[StageFile], Iterator[Row]]
_TABLES: tuple[tuple[str, tuple[str, ...], _Make], ...] = (
    ("What the project aims at:", ("what", "measured", "target", ""), target_rows),
    (
        "Decode steps (floor: weights and K/V at the bandwidth of a copy):",
        ("of", "mode", "batch x context", "ms", "floor ms", "ratio"),
        decode_rows,
    ),
    (
        "Requests through `vattn.LLM`:",
        ("load", "shape", "at a time", "tok/s", *("TTFT p50 ms", "p99", "TPOT p50 ms", "p99")),
        served_rows,
    ),
    (
        _LAYOUTS,
        ("layout", "speed", "worst", "live"),
        layout_rows,
    ),
    (
        _CALLS,
        ("call", "page", "run of", "whole run", "one by one", "idle / beside"),
        call_rows,
    ),
    (
        _ALLOCATORS,
        ("tensors from", "step, ms", "memory", "calls", "memory, fragments", "cached pair, ns"),
        allocator_rows,
    ),
    (
        "Kernel launches, microseconds:",
        ("beside", "page", "median", "p99"),
        launch_rows,
    ),
    ("Tests on the device:", ("stage", "result"), test_rows),
)
