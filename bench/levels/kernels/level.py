"""Attention alone: contiguous virtual and ordinary memory against blocks of every size.

    python -m bench kernels
    python -m bench kernels --shapes llama-3-8b --contexts 16K --batches 1,8,32 --blocks 16,256
    python -m bench kernels --preset paper-prefill

In a cell (phase, shape, batch, context) a kernel library reads the same random K and V from slots
of a KVCache in the device's default layout, from ordinary tensors, and from blocks of each size it
takes, which lie shuffled as after hours of serving. All sides take turns; a ratio is time over that
on virtual slots, so above 1 contiguous is faster. Decodes go round enough layers that none is still
in the last-level cache; a prompt is attended to whole, on a CPU its last chunk. Every side is
checked against float32 before it is timed, on ragged sequences with NaN wherever it must not read,
and in each cell. Making block tables and mapping pages is no part of the times; other levels have
both.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from bench.common import Json, Target, counts
from bench.layout import DTYPES
from bench.levels.kernels import tables as kernels_tables
from bench.levels.kernels.blocks import PLACEMENTS, SHUFFLED
from bench.levels.kernels.grid import PHASES, distinct
from bench.levels.kernels.presets import PRESETS
from bench.levels.kernels.run import Run
from bench.levels.level import Level, Preset
from bench.levels.table import Table
from bench.paged.kernels import kinds
from bench.partial import Partial

_ALL_SHAPES = [
    "llama-3-8b",
    "yi-6b",
    "yi-34b",
    "qwen3-0.6b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "llama-3-8b-tp2",
    "yi-34b-tp2",
]


class Kernels(Level):
    """See the module."""

    name: ClassVar[str] = "kernels"
    summary: ClassVar[str] = "attention on contiguous memory against blocks, kernel by kernel"
    rows: ClassVar[tuple[str, ...]] = ("rows",)
    defaults: ClassVar[Mapping[str, Json]] = {
        "cuda": {
            "shapes": _ALL_SHAPES,
            "phases": list(PHASES),
            "batches": [1, 8, 32],
            "contexts": [1024, 4096, 16384, 65536],
            "prompts": [1024, 4096, 16384, 65536],
            "chunk": 0,
            "blocks": [],
            "kernels": [],
            "wide": 1,
            "dtype": "bfloat16",
            "rounds": 9,
            "repeats": 3,
            "cell_s": 1.5,
            "max_gib": 100.0,
            "budget_s": 240.0,
            "placement": SHUFFLED,
            "clock": "wall",
        },
        "cpu": {
            "shapes": _ALL_SHAPES,
            "phases": list(PHASES),
            "batches": [1, 8],
            "contexts": [128, 512, 2048],
            "prompts": [256, 512, 2048],
            "chunk": 128,
            "blocks": [16, 32, 64, 128, 256],
            "kernels": [],
            "wide": 1,
            "dtype": "float32",
            "rounds": 7,
            "repeats": 3,
            "cell_s": 5.0,
            "max_gib": 8.0,
            "budget_s": 270.0,
            "placement": SHUFFLED,
            "clock": "wall",
        },
    }
    small: ClassVar[Json] = {
        "shapes": ["llama-3-8b-tp2"],
        "batches": [2],
        "contexts": [256],
        "prompts": [64],
        "chunk": 32,
        "blocks": [16, 256],
        "rounds": 3,
        "repeats": 2,
        "cell_s": 0.5,
        "budget_s": 60.0,
    }
    presets: ClassVar[Mapping[str, Preset]] = PRESETS

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        """See :meth:`Level.add_arguments`."""

        def names(text: str) -> list[str]:
            return text.split(",")

        cli.add_argument("--shapes", type=names, help="most telling first: llama-3-8b,yi-6b")
        cli.add_argument("--phases", type=names, help=",".join(PHASES))
        cli.add_argument("--batches", type=counts, help="of decodes, such as 1,8,32")
        cli.add_argument("--contexts", type=counts, help="of decodes, such as 1K,16K")
        cli.add_argument("--prompts", type=counts, help="of prefill, one request at a time")
        cli.add_argument("--chunk", type=int, help="last tokens of a prompt; 0: the whole prompt")
        cli.add_argument("--blocks", type=counts, help="block sizes; default: all that are taken")
        cli.add_argument("--kernels", type=names, help="default: all found")
        cli.add_argument("--wide", type=int, help="so many shapes are measured at every point")
        cli.add_argument("--dtype", choices=sorted(DTYPES))
        cli.add_argument("--rounds", type=int, help="turns of every side in a repeat")
        cli.add_argument("--repeats", type=int, help="of each ratio, whose spread is stated")
        cli.add_argument("--cell-s", type=float, help="seconds for a kernel in a cell, about")
        cli.add_argument("--max-gib", type=float, help="memory that a cell may take")
        cli.add_argument(
            "--clock",
            choices=["wall", "cpu"],
            help="cpu: CPU time, on a busy machine; of one thread only (OMP_NUM_THREADS=1)",
        )
        cli.add_argument("--placement", choices=PLACEMENTS, help="of blocks in their pool")

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        """See :meth:`Level.measure`."""
        _check(args)
        with torch.inference_mode():
            Run(args, out).all()

    def tables(self, results: Json) -> list[Table]:
        """See :meth:`Level.tables`."""
        return kernels_tables.tables(results)

    def targets(self, settings: Json, results: Json) -> list[Target]:
        """See :meth:`Level.targets`."""
        return kernels_tables.targets(settings, results)

    def draw(self, figure: Any, results: Json) -> bool:
        """See :meth:`Level.draw`."""
        return kernels_tables.draw(figure, results)


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        SystemExit: names the argument, its value and what it may be.
    """
    problems = []
    try:
        distinct(args.shapes)
    except ValueError as error:
        problems.append(f"--shapes: {error}")
    unknown = [phase for phase in args.phases if phase not in PHASES]
    if unknown:
        problems.append(f"--phases: no {', '.join(unknown)}; there are {', '.join(PHASES)}")
    known = kinds()
    unknown = [name for name in args.kernels if name not in known]
    if unknown:
        problems.append(f"--kernels: no kernel {', '.join(unknown)}; there are {', '.join(known)}")
    problems += [
        f"--{name} {getattr(args, name)}: has to be at least 1"
        for name in ("rounds", "repeats", "wide")
        if getattr(args, name) < 1
    ]
    if args.clock == "cpu" and (args.device != "cpu" or torch.get_num_threads() > 1):
        problems.append("--clock cpu: times one thread of a CPU; set OMP_NUM_THREADS=1")
    if args.chunk < 0:
        problems.append(f"--chunk {args.chunk}: give tokens, or 0 for whole prompts")
    if problems:
        raise SystemExit("python -m bench kernels: " + "; ".join(problems))
