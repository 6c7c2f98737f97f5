"""Our own choices, undone one by one, and what vAttention's paper chose.

Each row is two engines on the same weights that differ in one choice. They take turns of a few
steps and serve the same requests; above 1, ours is faster. Beside the time stand the driver's calls
and the bytes, which do not depend on the machine.

On a CPU a mapping costs little, so what mapping ahead and deferred reclamation are worth is also
shown by the engine's step loop without a model, on a fake GPU whose driver calls take as long as
published ones do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench.common import Json, counts, short_bytes
from bench.levels.ablations.runs import Engines, published_costs
from bench.levels.level import Level, Preset, Published
from bench.levels.repeat import cell
from bench.levels.table import Table
from bench.model_args import names
from bench.partial import Partial
from bench.shapes import DTYPES, SHAPES

CHOICES = (
    "mapping ahead",
    "deferred reclamation",
    "page size",
    "layout",
    "prefix caching",
    "asynchronous scheduling",
)
COSTS = "published costs"
_PAPER = "vAttention (ASPLOS 2025)"
PUBLISHED = (
    Published("mapping and access of a 2 MiB page", "about 40 us", _PAPER, "A100"),
    Published("spikes of a decode step without mapping ahead", "5-15 ms", _PAPER, "A100"),
    Published("most requests at once, 2 MiB pages", "187", _PAPER, "Yi-6B, A100"),
    Published("most requests at once, 64 KiB pages", "240", _PAPER, "Yi-6B, A100, patched driver"),
    Published("most requests at once, 2 MiB pages", "203", _PAPER, "Llama-3-8B, A100"),
    Published("most requests at once, 64 KiB pages", "258", _PAPER, "Llama-3-8B, A100"),
)
_LOOP: Json = {
    "loop_divisor": 1,
    "loop_running": 64,
    "loop_layers": 32,
    "loop_device_ms": 10.0,
    "loop_budget_mib": 18 << 10,
    "loop_warm_up": 700,
    "loop_turns": 4,
    "loop_steps": 50,
}


class Ablations(Level):
    """``python -m bench ablations``."""

    name = "ablations"
    summary = "Our own choices, one by one: mapping, reclamation, pages, layout, prefixes."
    rows = ("choices", "loops")
    defaults: ClassVar[Mapping[str, Json]] = {
        "cpu": {
            "choices": [*CHOICES, COSTS],
            "shape": "small-llama",
            "dtype": "float32",
            "requests": 24,
            "divisor": 4,
            "sequences": 8,
            "prefix": [16, 512, 32, 32],
            "repeats": 3,
            "turn_steps": 1,
            "budget_mib": 1024,
            **_LOOP,
        },
        "cuda": {
            "choices": [*CHOICES],
            "shape": "llama3-8b",
            "dtype": "bfloat16",
            "requests": 256,
            "divisor": 1,
            "sequences": 64,
            "prefix": [64, 4096, 128, 128],
            "repeats": 3,
            "turn_steps": 16,
            "budget_mib": 0,
            **_LOOP,
        },
    }
    small: ClassVar[Json] = {
        "shape": "tiny-llama",
        "requests": 8,
        "divisor": 16,
        "sequences": 3,
        "prefix": [4, 64, 8, 4],
        "repeats": 2,
        "turn_steps": 1,
        "budget_mib": 128,
        "loop_divisor": 8,
        "loop_running": 8,
        "loop_layers": 8,
        "loop_device_ms": 2.0,
        "loop_budget_mib": 240,
        "loop_warm_up": 40,
        "loop_turns": 2,
        "loop_steps": 10,
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper-policies": Preset(
            help="the policies of vAttention's paper, its figures beside ours",
            settings={
                device: {"choices": [*CHOICES[:4], *([COSTS] if device == "cpu" else [])]}
                for device in ("cpu", "cuda")
            },
            published=PUBLISHED,
        )
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        known = [*CHOICES, COSTS]
        cli.add_argument("--choices", type=names(known), help=f"of {', '.join(known)}")
        cli.add_argument("--shape", choices=sorted(SHAPES), help="of the model")
        cli.add_argument("--dtype", choices=sorted(DTYPES))
        cli.add_argument("--trace", type=Path, metavar="FILE", help="lengths; default: drawn")
        cli.add_argument("--requests", type=int, help="of a round")
        cli.add_argument("--divisor", type=int, help="of the lengths")
        cli.add_argument("--sequences", type=int, help="requests that run at once")
        cli.add_argument(
            "--prefix", type=counts, help="requests, shared, own and new tokens: 16,512,32,32"
        )
        cli.add_argument("--repeats", type=int, help="rounds, each with new prompts")
        cli.add_argument("--turn-steps", type=int, help="engine steps of a turn")
        cli.add_argument("--budget-mib", type=int, help="of each engine; 0: of what is free")
        loop = cli.add_argument_group("the loop at published costs")
        loop.add_argument("--loop-divisor", type=int, help="of the lengths")
        loop.add_argument("--loop-running", type=int, help="sequences at once")
        loop.add_argument("--loop-layers", type=int, help="of the model, as Llama-3-8B's")
        loop.add_argument("--loop-device-ms", type=float, help="that the device takes for a step")
        loop.add_argument("--loop-budget-mib", type=int, help="of K and V")
        loop.add_argument("--loop-warm-up", type=int, help="steps before")
        loop.add_argument("--loop-turns", type=int, help="of each way")
        loop.add_argument("--loop-steps", type=int, help="of a turn")

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        out.set(absent={})
        if set(args.choices) & set(CHOICES):
            Engines(args, out).run()
        if COSTS in args.choices and args.budget.allows(COSTS):
            with out.part(COSTS):
                published_costs(args, out)

    def tables(self, results: Json) -> list[Table]:
        return [
            table
            for table in (
                _choices_table(results.get("choices", [])),
                _loops_table(results.get("loops", []), results.get("costs_us", {})),
            )
            if table.rows
        ]

    def draw(self, figure: Any, results: Json) -> bool:
        rows = results.get("choices", [])
        if not rows:
            return False
        axes = figure.subplots()
        found = [row["ratio"] for row in rows]
        low = [r["ratio"] - min(r["repeats"]) for r in found]
        high = [max(r["repeats"]) - r["ratio"] for r in found]
        at = range(len(rows))
        axes.barh(at, [r["ratio"] for r in found], xerr=[low, high], capsize=3)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(at, [f"{r['choice']}: {r['other']['what']}" for r in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("time without our choice / time with it")
        return True


def _choices_table(rows: Sequence[Json]) -> Table:
    sides = ("ours", "other")
    return Table(
        "one choice at a time: time of the other / time of ours",
        [
            *("choice", "ours", "other", "the paper's", "ours is x", "map calls", "unmap calls"),
            *("live share", "most physical", "prefix hits", "equal texts"),
        ],
        [
            [
                *(r["choice"], r["ours"]["what"], r["other"]["what"], r["paper"]),
                cell(r["ratio"]),
                *(" / ".join(str(r[s]["calls"][op]) for s in sides) for op in ("map", "unmap")),
                " / ".join(f"{r[s]['live_share']:.2f}" for s in sides),
                " / ".join(short_bytes(r[s]["peak_physical_bytes"]) for s in sides),
                " / ".join(str(r[s]["ran"]["prefix_cache_hits"]) for s in sides),
                f"{r['equal_texts']}/{r['compared_texts']}",
            ]
            for r in rows
        ],
        "Pairs are ours / other; calls are of the whole run; the live share is K and V over the "
        "bytes of the pages that they are in, when there was the most of them: above 1 where pages "
        "are shared. Hits are in tokens.",
    )


def _loops_table(rows: Sequence[Json], costs_us: Mapping[str, float]) -> Table:
    costs = ", ".join(f"{name} {cost:g}" for name, cost in costs_us.items())
    return Table(
        "the step loop at published costs of driver calls, no model: step / device time",
        [
            *("way", "steps", "p50", "p99", "max", "pages only p99", "us for pages p50", "p99"),
            *("create/step", "map/step", "access/step", "unmap/step"),
        ],
        [
            [
                *(r["way"], r["steps"]),
                *(round(r["step_over_device"][q], 3) for q in ("p50", "p99", "max")),
                round(r["with_pages_over_device"]["p99"], 3),
                *(round(r["pages_us"][q]) for q in ("p50", "p99")),
                *(
                    round(r["calls_per_step"][op], 2)
                    for op in ("create", "map", "set_access", "unmap")
                ),
            ]
            for r in rows
        ],
        "ahead: ours; sync: all mapping between two steps; sync fresh: and a released slot keeps "
        f"nothing; free: as ahead, calls that cost nothing. Costs in us: {costs}.",
    )
