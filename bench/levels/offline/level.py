"""Offline throughput: slots against blocks under the same scheduler, model and requests.

Two engines on the same weights take turns of a few steps and serve the same requests, greedily;
their tokens are compared. Five workloads:

    contexts   decode steps of a batch whose sequences are all so long; prompts are not timed. The
               batch shrinks as they grow, so that all points have as much K and V: most of what a
               step reads, as on a GPU that is full
    heavy      the same where weights are most of it
    trace      whole requests with the lengths of a trace
    long       whole requests with long prompts, as in vAttention's paper
    prefix     whole requests that begin with the same tokens, which both sides share

Both sides have the same budget, with room for all that run as far as the device has it. The block
size of each paged kernel is the fastest of a sweep on this machine; of equals, the smallest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bench.common import Json, Target, counts, short_count
from bench.levels.block_sweep import blocks_table
from bench.levels.engines import SAME_LIBRARY
from bench.levels.level import Level, Preset, Published
from bench.levels.offline.runs import Comparison
from bench.levels.offline.tables import contexts_table, rounds_table
from bench.levels.table import Table
from bench.model_args import names, points
from bench.partial import Partial
from bench.shapes import DTYPES, SHAPES

WORKLOADS = ("contexts", "heavy", "trace", "long", "prefix")
_TARGET_CONTEXT, _TARGET_RATIO = 512, 1.3

_RATIOS = (
    ("Yi-6B", "FlashAttention-2", "1.18x"),
    ("Yi-6B", "FlashInfer", "1.19x"),
    ("Llama-3-8B", "FlashAttention-2", "1.15x"),
    ("Llama-3-8B", "FlashInfer", "1.23x"),
    ("Yi-34B", "FlashAttention-2", "1.13x"),
    ("Yi-34B", "FlashInfer", "1.14x"),
)
PUBLISHED = (
    *(
        Published(
            f"requests per minute, contiguous over {base} paged",
            figure,
            "vAttention (ASPLOS 2025), offline throughput",
            f"{model}, A100, 427 requests of 64K-192K tokens",
        )
        for model, base, figure in _RATIOS
    ),
    Published(
        "tokens per second, contiguous over vLLM",
        "1.97x",
        "vAttention, first version (2024)",
        "A100, vLLM's own kernel of then",
    ),
)


class Offline(Level):
    """``python -m bench offline``."""

    name = "offline"
    summary = "Requests and tokens per minute through one engine, contiguous against paged."
    rows = ("contexts", "rounds")
    defaults: ClassVar[Mapping[str, Json]] = {
        "cpu": {
            "workloads": list(WORKLOADS),
            "shape": "small-llama",
            "heavy_shape": "llama-8x512",
            "long_shape": "small-llama",
            "dtype": "float32",
            "kernels": ["sdpa-gather"],
            "sweep": [(8, 512)],
            "points": [(128, 128), (32, 512), (16, 1024), (8, 2048), (4, 4096)],
            "heavy_points": [(8, 128), (8, 512)],
            "turns": 12,
            "turn_steps": 1,
            "repeats": 3,
            "requests": 24,
            "divisor": 2,
            "sequences": 16,
            "long_requests": 8,
            "long_divisor": 32,
            "long_sequences": 4,
            "prefix": [16, 512, 32, 32],
        },
        "cuda": {
            "workloads": list(WORKLOADS),
            "shape": "llama3-8b",
            "heavy_shape": "llama3-8b",
            "long_shape": "llama3-8b",
            "dtype": "bfloat16",
            "kernels": ["fa3", "vllm-fa3", "flashinfer", "fa2", "vllm-fa2", "torch"],
            "sweep": [(16, 4096)],
            "points": [(256, 512), (128, 1024), (32, 4096), (8, 16384), (2, 65536)],
            "heavy_points": [(1, 128), (16, 512)],
            "turns": 8,
            "turn_steps": 8,
            "repeats": 3,
            "requests": 256,
            "divisor": 1,
            "sequences": 128,
            "long_requests": 4,
            "long_divisor": 1,
            "long_sequences": 4,
            "prefix": [64, 4096, 128, 128],
        },
    }
    small: ClassVar[Json] = {
        "shape": "tiny-llama",
        "heavy_shape": "tiny-llama",
        "long_shape": "tiny-llama",
        "sweep": [(2, 32)],
        "blocks": [16, 32],
        "points": [(2, 32), (2, 96)],
        "heavy_points": [(1, 16)],
        "turns": 3,
        "turn_steps": 1,
        "repeats": 2,
        "requests": 6,
        "divisor": 64,
        "sequences": 4,
        "long_requests": 2,
        "long_divisor": 512,
        "long_sequences": 2,
        "prefix": [4, 64, 8, 4],
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper-offline": Preset(
            help="long prompts, as vAttention's offline experiment; --long-trace takes its file",
            settings={
                "cpu": {
                    "workloads": ["long"],
                    "long_requests": 24,
                    "long_divisor": 32,
                    "long_sequences": 6,
                },
                "cuda": {
                    "workloads": ["long"],
                    "long_shape": "yi-6b",
                    "kernels": ["fa2", "flashinfer", "fa3"],
                    "sweep": [(2, 32768)],
                    "long_requests": 12,
                    "long_sequences": 8,
                    "step_tokens": 16384,
                    "repeats": 1,
                },
            },
            small={"workloads": ["long"]},
            published=PUBLISHED,
        )
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        cli.add_argument("--workloads", type=names(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
        cli.add_argument("--shape", choices=sorted(SHAPES), help="of the model")
        cli.add_argument("--heavy-shape", choices=sorted(SHAPES), help="whose weights dominate")
        cli.add_argument("--long-shape", choices=sorted(SHAPES), help="for long prompts")
        cli.add_argument("--dtype", choices=sorted(DTYPES))
        cli.add_argument("--kernels", type=names([*SAME_LIBRARY]), help="paged ones to compare")
        cli.add_argument(
            "--blocks", type=counts, help="block sizes to try; default: all that a kernel takes"
        )
        cli.add_argument("--sweep", type=points, help="batch x context to try block sizes with")
        cli.add_argument("--points", type=points, help="batch x context, as 8x512,4x2K")
        cli.add_argument("--heavy-points", type=points, help="the same for --heavy-shape")
        cli.add_argument("--turns", type=int, help="timed, of each side and repeat")
        cli.add_argument("--turn-steps", type=int, help="engine steps of a turn")
        cli.add_argument("--repeats", type=int, help="of each comparison, with new prompts")
        cli.add_argument("--step-tokens", type=int, help="computed in a step at most")
        for group, what in (("", "trace"), ("long-", "long prompts")):
            flag = f"--{group}trace" if group else "--trace"
            cli.add_argument(flag, type=Path, metavar="FILE", help=f"lengths of the {what}")
            cli.add_argument(f"--{group}requests", type=int, help=f"of the {what}, in a round")
            cli.add_argument(f"--{group}divisor", type=int, help=f"of the lengths, {what}")
            cli.add_argument(f"--{group}sequences", type=int, help=f"at once, {what}")
        cli.add_argument(
            "--prefix", type=counts, help="requests, shared, own and new tokens: 16,512,32,32"
        )

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        Comparison(args, out).run()

    def tables(self, results: Json) -> list[Table]:
        return [
            table
            for table in (
                contexts_table(results.get("contexts", [])),
                rounds_table(results.get("rounds", [])),
                blocks_table(results.get("blocks", [])),
            )
            if table.rows
        ]

    def targets(self, settings: Json, results: Json) -> list[Target]:
        if settings["device"] != "cpu" or "contexts" not in settings["workloads"]:
            return []
        ratios = {
            kind: {
                f"{r['batch']} x {r['context']}, {r['kernel']}": r["ratio"]["ratio"]
                for r in results.get("contexts", ())
                if r["workload"] == kind and r["context"] >= _TARGET_CONTEXT
            }
            for kind in ("contexts", "heavy")
        }
        least = min(ratios["contexts"], key=lambda at: ratios["contexts"][at], default=None)
        name = f"decode at a context of {_TARGET_CONTEXT} and more, contiguous over paged"
        measured = None if least is None else ratios["contexts"][least]
        note = "" if least is None else f"the least, at {least}"
        if ratios["heavy"]:
            note += f"; {min(ratios['heavy'].values()):.2f}x where weights dominate"
        return [Target(name, measured, _TARGET_RATIO, "x", at_least=True, note=note)]

    def draw(self, figure: Any, results: Json) -> bool:
        contexts = sorted(results.get("contexts", []), key=lambda r: str(r["workload"]))
        rows = contexts + results.get("rounds", [])
        if not rows:
            return False
        labels = [_label(row) for row in rows]
        axes = figure.subplots()
        at = range(len(rows))
        found = [row["ratio"] for row in rows]
        low = [r["ratio"] - min(r["repeats"]) for r in found]
        high = [max(r["repeats"]) - r["ratio"] for r in found]
        axes.bar(at, [r["ratio"] for r in found], yerr=[low, high], capsize=3)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(at, labels, rotation=60, ha="right", fontsize=7)
        axes.set_ylabel("paged time / contiguous time")
        axes.set_title("above 1, contiguous is faster")
        return True


def _label(row: Json) -> str:
    what = row["workload"]
    if "context" in row:
        what = f"{row['shape']}, {row['batch']} x {short_count(row['context'])}"
    return f"{what}, {row['kernel']}"
