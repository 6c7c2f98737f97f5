"""The plots of the report: SVG, the same bytes for the same results and the same matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import svg
from bench.common import Json, short_bytes, short_count
from bench.report_files import StageFile

_WIDTH_IN, _HEIGHT_IN = 7.0, 4.0
_STEP = ("mode", "batch", "context", "flow_us", "floor_us")
_SERVED = ("shape", "concurrency", "tokens_per_s")
_PLOTTED_OPS = ("create", "map", "set_access", "unmap")

Draw = Callable[[Any, StageFile], None]


def plots_of(files: Sequence[StageFile]) -> list[tuple[str, str, StageFile, Draw]]:
    """Title, file name, source and painter of every plot for which there are figures."""
    by_stage = {file.stage: file for file in files}
    found = []
    for stage, name, title, has, draw in _PLOTS:
        file = by_stage.get(stage)
        if file is not None and has(file):
            found.append((f"{title}, {file.gpu}", f"gpu-{file.folder}-{name}.svg", file, draw))
    return found


def write(files: Sequence[StageFile], folder: Path) -> None:
    """Draws every plot into the folder.

    Raises:
        ModuleNotFoundError: no matplotlib; it is part of the extra "bench".
    """
    for title, name, file, draw in plots_of(files):
        _save(title, folder / name, file, draw)


def _save(title: str, path: Path, file: StageFile, draw: Draw) -> None:
    from matplotlib.figure import Figure

    with svg.style(path):
        figure = Figure((_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = figure.subplots()
        said = "" if file.status == "passed" else f", {file.status}"
        axes.set_title(f"{title} ({file.commit}{said})", fontsize=10)
        draw(axes, file)
        svg.save(figure, path)


def _draw_front(axes: Any, file: StageFile) -> None:
    suggestion = file.results["suggestion"]
    layouts = suggestion["layouts"]
    axes.scatter([r["live_share"] for r in layouts], [r["speed"] for r in layouts], color="0.7")
    front = sorted(suggestion["front"], key=lambda r: float(r["live_share"]))
    axes.plot([r["live_share"] for r in front], [r["speed"] for r in front], "o-", label="front")
    for row in front:
        name = f"{row['layers_per_region'] or 'all'} x {short_bytes(row['page_bytes'])}"
        axes.annotate(name, (row["live_share"], row["speed"]), fontsize=7, ha="right")
    axes.axvline(0.95, color="0.6", linestyle=":")
    axes.axhline(0.98, color="0.6", linestyle=":")
    axes.set_xlabel("live / physical bytes on a trace's lengths")
    axes.set_ylabel("speed of attention against ordinary tensors")


def _draw_decode(axes: Any, file: StageFile) -> None:
    steps = file.rows("decode", "steps", *_STEP)
    names = [f"{r['mode']}\n{r['batch']} x {short_count(r['context'])}" for r in steps]
    at = range(len(steps))
    axes.bar(at, [r["flow_us"] / 1e3 for r in steps], color="C0", label="step")
    axes.bar(at, [r["floor_us"] / 1e3 for r in steps], color="0.6", label="floor", width=0.5)
    axes.set_xticks(at, names, fontsize=7)
    axes.set_ylabel("ms")
    axes.legend()


def _draw_throughput(axes: Any, file: StageFile) -> None:
    served = sorted(file.rows("workload", "served", *_SERVED), key=lambda r: int(r["concurrency"]))
    at = range(len(served))
    axes.bar(at, [r["tokens_per_s"] for r in served])
    axes.set_xticks(at, [str(r["concurrency"]) for r in served])
    axes.set_xlabel(f"requests at a time, {served[0]['shape']}")
    axes.set_ylabel("generated tokens / s")


def _draw_calls(axes: Any, file: StageFile) -> None:
    rows = _cuda_calls(file)
    for op in _PLOTTED_OPS:
        of_op = [r for r in rows if r["op"] == op]
        longest: dict[int, Any] = {}
        for row in sorted(of_op, key=lambda r: int(r["run_pages"])):
            longest[row["page_bytes"]] = row
        sizes = sorted(longest)
        if sizes:
            us = [longest[size]["run_us_per_page"] for size in sizes]
            axes.plot([size / 2**20 for size in sizes], us, "o-", label=op)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("page, MiB")
    axes.set_ylabel("us per page, in the longest run")
    axes.legend(fontsize=7)


def _has_front(file: StageFile) -> bool:
    return bool((file.results.get("suggestion") or {}).get("front"))


def _cuda_calls(file: StageFile) -> list[Json]:
    keys = ("driver", "op", "page_bytes", "run_pages", "run_us_per_page")
    return [row for row in file.rows("vmm", "operations", *keys) if row["driver"] == "cuda"]


_PLOTS: tuple[tuple[str, str, str, Callable[[StageFile], bool], Draw], ...] = (
    ("layout", "layout", "Layouts: speed and waste", _has_front, _draw_front),
    (
        *("decode", "decode", "Decode step and its floor"),
        lambda file: bool(file.rows("decode", "steps", *_STEP)),
        _draw_decode,
    ),
    (
        *("workload", "throughput", "Throughput"),
        lambda file: bool(file.rows("workload", "served", *_SERVED)),
        _draw_throughput,
    ),
    ("vmm", "driver-calls", "Driver calls", lambda file: bool(_cuda_calls(file)), _draw_calls),
)
