"""Bytes, driver calls and block tables of both kinds of memory. No model, and no GPU needed.

    python -m bench memory --trace conv.csv.gz    # the requests of a trace
    python -m bench memory                        # lengths drawn like those of a chat trace
    python -m bench memory --preset paper-fragmentation
    python -m bench memory --preset paper-allocation

    waste     bytes of K and V / bytes of the pages or blocks with at least one token in them;
              cover beside it: pages beyond the last token, for kernels that read whole tiles
    batch     most requests at once in a budget, admitted in the trace's order
    calls     of the driver, while a cache fills and in steady state
    rate      new memory that decoding needs per second, at stated step times
    tables    host time of block tables per step, against ensure_many's
    latency   of the driver's calls; on a GPU only

On a CPU the CUDA driver is the real code on the fake libcuda with nothing behind its pages, so the
full size fits anywhere. Pages below 2 MiB need a patched driver on a GPU: the fake plays one, and
on a GPU they are computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bench.common import Json, Target, counts, sizes
from bench.fake import PUBLISHED_US
from bench.levels.level import Level, Preset
from bench.levels.memory import views
from bench.levels.memory.parts import PARTS
from bench.levels.memory.published import ALLOCATION, FRAGMENTATION
from bench.levels.memory.shapes import ALL, PUBLISHED_MOST, SHAPES, shorter
from bench.levels.table import Table
from bench.partial import Partial
from bench.trace import open_trace
from vattn.config import parse_bytes

_PAGES = [64 << 10, 256 << 10, 2 << 20, 4 << 20]
_FULL: Json = {
    "parts": list(PARTS),
    "shapes": ["llama3-8b", "yi-6b", "yi-34b", "qwen3-8b"],
    "divisor": 1,
    "sequences": 256,
    "max_model_len": 16384,
    "layers_per_region": [1, 2, 4, 8, ALL],
    "pages": _PAGES,
    "host_pages": [16 << 10, 64 << 10],
    "host_bytes": 3 << 30,
    "block_tokens": [16, 32, 64, 128, 256],
    "kv_budget": None,
    "stretches": 16,
    "running": 128,
    "steps": 1500,
    "batches": [8, 64, 256],
    "bandwidth": 2.04e12,
    "flops": 312e12,
    "table_sequences": [1, 16, 64, 256],
    "table_contexts": [1 << 10, 8 << 10, 32 << 10, 128 << 10],
    "table_blocks": [16, 256],
    "most_tokens": 1 << 20,
    "pairs": 60,
    "repeats": 5,
}
# What real pages take time for: each is created and zeroed. Those below 2 MiB are computed.
_ON_GPU: Json = {
    "parts": ["latency", "tables", "calls", "waste", "rate", "batch"],
    "shapes": ["llama3-8b"],
    "pages": [64 << 10, 2 << 20, 4 << 20],
    "layers_per_region": [1, 8, ALL],
    "running": 64,
    "most_tokens": 1 << 18,
}
_PAPER: Json = {"shapes": list(PUBLISHED_MOST), "max_model_len": 65536}


class Memory(Level):
    """Waste, batches, driver calls, rates and tables; see the module."""

    name = "memory"
    summary = __doc__ or ""
    rows = tuple(PARTS)
    defaults: ClassVar[Mapping[str, Json]] = {"cpu": _FULL, "cuda": _FULL | _ON_GPU}
    small: ClassVar[Json] = {
        "shapes": ["llama3-8b"],
        "divisor": 8,
        "sequences": 16,
        "layers_per_region": [1, 8, ALL],
        "pages": [64 << 10, 2 << 20],
        "host_bytes": 16 << 20,
        "block_tokens": [16, 64],
        "kv_budget": 4 << 30,
        "stretches": 4,
        "running": 8,
        "steps": 100,
        "batches": [1, 8],
        "table_sequences": [4],
        "table_contexts": [256],
        "table_blocks": [16],
        "pairs": 4,
        "repeats": 2,
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper-fragmentation": Preset(
            "most requests at once by page size, in the budget and at the mean length that the "
            "published figures imply",
            {
                device: _PAPER
                | {
                    "parts": ["waste", "batch"],
                    "kv_budget": "implied",
                    "layers_per_region": [1, 8, ALL],
                    "pages": [64 << 10, 128 << 10, 256 << 10, 2 << 20],
                    "block_tokens": [16, 256],
                    "sequences": 64,
                }
                for device in ("cpu", "cuda")
            },
            # At short lengths the implied budget would hold thousands.
            small={
                "shapes": ["yi-34b-tp2"],
                "divisor": 1,
                "kv_budget": "implied",
                "layers_per_region": [8],
            },
            published=FRAGMENTATION,
        ),
        "paper-allocation": Preset(
            "need for new memory per second, cost of mapping it, and of preparing block tables",
            {
                device: _PAPER
                | {"parts": ["calls", "rate", "tables", "latency"], "layers_per_region": [8]}
                for device in ("cpu", "cuda")
            },
            small={"shapes": ["yi-6b"]},
            published=ALLOCATION,
        ),
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        add = cli.add_argument
        add("--trace", type=Path, metavar="FILE", help="lengths (csv or csv.gz)")
        add("--parts", type=names_of(tuple(PARTS)), metavar="LIST", help=", ".join(PARTS))
        add(
            "--shapes",
            type=names_of(tuple(SHAPES)),
            metavar="LIST",
            help=f"the first in detail; {', '.join(SHAPES)}",
        )
        add("--divisor", type=positive, help="of all lengths")
        add("--sequences", type=positive, help="requests of the trace whose waste is measured")
        add(
            "--max-model-len",
            type=positive,
            help="longer requests are left out; what is preallocated",
        )
        add("--layers-per-region", type=layer_counts, metavar="LIST", help="0 for all layers")
        add("--pages", type=sizes, metavar="LIST", help="of the CUDA driver")
        add("--host-pages", type=sizes, metavar="LIST")
        add("--host-bytes", type=byte_count, help="most memory of a host cell")
        add("--block-tokens", type=counts, metavar="LIST", help="of the paged cache")
        add(
            "--kv-budget",
            type=kv_budget,
            metavar="BYTES",
            help="for the most requests; default: 0.9 of 80 GiB less the weights; 'implied': budget"
            " and mean length that the paper's figures imply",
        )
        add("--stretches", type=positive, help="of the trace, each admitted from its beginning")
        add("--running", type=positive, help="sequences at any time while calls are counted")
        add("--steps", type=positive, help="that warm up, and as many that are counted")
        add("--batches", type=counts, metavar="LIST", help="sequences that decode, for the rate")
        add("--bandwidth", type=rate, help="bytes per second of the GPU assumed for the rate")
        add("--flops", type=rate, help="of that GPU per second")
        add("--table-sequences", type=counts, metavar="LIST")
        add("--table-contexts", type=counts, metavar="LIST", help="tokens of each sequence")
        add("--table-blocks", type=counts, metavar="LIST", help="tokens of a block")
        add("--most-tokens", type=positive, help="in all of a batch whose tables are timed")
        add("--pairs", type=positive)
        add("--repeats", type=positive)

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        try:
            whole = open_trace(args.trace)
            whole = whole.scaled(args.divisor) if args.divisor > 1 else whole
            trace = shorter(whole, args.max_model_len)
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
        shapes = [SHAPES[name] for name in args.shapes]
        out.set(
            trace=trace.as_json() | {"left_out": len(whole) - len(trace)},
            shapes={shape.name: shape.as_json() for shape in shapes},
            costs_us=dict(PUBLISHED_US),
        )
        for name in args.parts:
            with out.part(name):
                PARTS[name](args, out, shapes, trace)

    def tables(self, results: Json) -> list[Table]:
        return views.tables(results)

    def targets(self, settings: Json, results: Json) -> list[Target]:
        return views.targets(settings, results)

    def draw(self, figure: Any, results: Json) -> bool:
        return views.draw(figure, results)


# Arguments ----------------------------------------------------------------------------------------


def names_of(known: tuple[str, ...]) -> Any:
    """A parser of lists of names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: there is no such thing; use {', '.join(known)}"
            )
        return names

    return parse


def layer_counts(text: str) -> list[int]:
    """``"1,8,0"``."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: give numbers of layers, 0 for all, as in 1,8,0")
    return [int(part) for part in parts]


def byte_count(text: str) -> int:
    """``"4GiB"``."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def kv_budget(text: str) -> int | str:
    """Bytes, or ``"implied"``."""
    return text if text == "implied" else byte_count(text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, 1 or more")
    return int(text)


def rate(text: str) -> float:
    """Per second, above 0: ``"2.04e12"``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0, such as 2.04e12")
    return value
