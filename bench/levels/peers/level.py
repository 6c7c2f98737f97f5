"""Others that serve the same model: transformers, vLLM, nano-vllm; where they are installed.

    python -m bench peers
    python -m bench peers --trace conv.csv.gz       # its lengths, divided; else they are drawn
    python -m bench peers --sides vattn,vllm --shape qwen3-0.6b

One model with random weights, one dtype, the same requests, greedy, every answer as long as asked
for. All sides are open and warm before anything is timed, then they take turns; every round has new
prompts, so that nobody finds a prefix of the round before. A ratio is the side's seconds over
vattn's, of the same round: above 1, vattn is faster.

    vattn            this engine, contiguous memory
    paged            this engine on bench.paged's block tables
    vllm, nano-vllm  in processes of their own, with their defaults but for sizes and memory
    generate_batch   transformers' continuous batching as a call: its manager is made for the work,
                     with the settings that are the fastest of a grid, tried before on this machine
    batch-defaults   the same with its own settings, which reserve most of the memory at each call:
                     on a CPU half a minute for it, so that it has a preset of its own
    manager          as generate_batch, with a manager that is made once and kept, as our engine is
    padded           generate() on batches, by arrival
    padded-sorted    the same on batches of similar answers, as if lengths were known
    single           generate() on one request at a time: the reference for the answers

    equal            requests of one length
    trace            lengths of a trace

A side much slower than vattn takes part in one round only. What is not installed, or does not run
here, is reported as absent with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from bench.common import Json, Target, counts
from bench.levels.budget_share import Share
from bench.levels.level import Level, Preset
from bench.levels.peers import tables as peers_tables
from bench.levels.peers.model import save_model
from bench.levels.peers.process import PeerError
from bench.levels.peers.sides import SIDES, Turns, engine_settings, open_side
from bench.levels.serving.windows import rounded
from bench.levels.table import Table
from bench.model_args import names, release
from bench.offline_sides import DECISIVE, BatchSettings, Side, Work, make_work, tune
from bench.partial import Partial
from bench.shapes import DTYPES, SHAPES, build_model
from bench.trace import open_trace

WORKLOADS = ("equal", "trace")
_ON_CPU = [name for name in SIDES if name != "batch-defaults"]
_ON_GPU = [name for name in SIDES if name != "single"]  # which takes a quarter of an hour
_DEFAULTS: Json = {"sides": ["vattn", "batch-defaults"], "rounds": 2}


class Peers(Level):
    """See the module."""

    name = "peers"
    summary = __doc__ or ""
    rows = ("throughput",)
    defaults: ClassVar[Mapping[str, Json]] = {
        "cpu": {
            "shape": "small-qwen3",
            "dtype": "float32",
            "sides": _ON_CPU,
            "workloads": list(WORKLOADS),
            "requests": 64,
            "prompt_tokens": 64,
            "new_tokens": 64,
            "trace_requests": 128,
            "divisor": 8,
            "sequences": 64,
            "rounds": 5,
            "batch_pages": [32, 256],
            "batch_tokens": [1024, 4096],
            "open_s": 120.0,
            "run_s": 120.0,
            "budget_s": 280.0,
        },
        "cuda": {
            "shape": "qwen3-0.6b",
            "dtype": "bfloat16",
            "sides": _ON_GPU,
            "workloads": list(WORKLOADS),
            "requests": 128,
            "prompt_tokens": 512,
            "new_tokens": 128,
            "trace_requests": 256,
            "divisor": 2,
            "sequences": 128,
            "rounds": 5,
            "batch_pages": [32, 256],
            "batch_tokens": [4096, 16384],
            "open_s": 300.0,
            "run_s": 120.0,
            "budget_s": 540.0,
        },
    }
    small: ClassVar[Json] = {
        "shape": "tiny-qwen3",
        "requests": 6,
        "prompt_tokens": 12,
        "new_tokens": 6,
        "trace_requests": 6,
        "divisor": 64,
        "sequences": 4,
        "rounds": 1,
        "batch_pages": [16],
        "batch_tokens": [64],
    }

    presets: ClassVar[Mapping[str, Preset]] = {
        "defaults": Preset(
            help="vattn against generate_batch with its own settings",
            settings={"cpu": _DEFAULTS, "cuda": _DEFAULTS},
        )
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        cli.add_argument("--shape", choices=sorted(SHAPES), help="of the model")
        cli.add_argument("--dtype", choices=sorted(DTYPES))
        cli.add_argument("--sides", type=names(SIDES), metavar="LIST", help="default: all")
        cli.add_argument("--workloads", type=names(WORKLOADS), metavar="LIST")
        cli.add_argument("--requests", type=int, help="of equal")
        cli.add_argument("--prompt-tokens", type=int, help="of equal")
        cli.add_argument("--new-tokens", type=int, help="of equal")
        cli.add_argument("--trace", type=Path, metavar="FILE", help="csv or csv.gz; else drawn")
        cli.add_argument("--trace-requests", type=int, help="the first of the trace")
        cli.add_argument("--divisor", type=int, help="of a trace's lengths")
        cli.add_argument("--sequences", type=int, help="at once, and rows of a batch")
        cli.add_argument("--rounds", type=int)
        cli.add_argument("--batch-pages", type=counts, metavar="LIST", help="of the grid")
        cli.add_argument("--batch-tokens", type=counts, metavar="LIST", help="of the grid")
        cli.add_argument("--open-s", type=float, help="that a peer may take to open")
        cli.add_argument("--run-s", type=float, help="that a peer may take for a round")

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        for i, name in enumerate(args.workloads):
            if args.budget.allows(name):
                share = Share(args.budget, i, len(args.workloads))
                with out.part(name), tempfile.TemporaryDirectory() as directory:
                    _Run(name, args, out, Path(directory)).all(share)
                release(args.device)

    def tables(self, results: Json) -> list[Table]:
        return peers_tables.tables(results)

    def targets(self, settings: Json, results: Json) -> list[Target]:
        return peers_tables.targets(settings, results)

    def draw(self, figure: Any, results: Json) -> bool:
        return peers_tables.draw(figure, results)


def make_rounds(name: str, args: argparse.Namespace) -> tuple[list[Work], str]:
    """The work of each round, the first of which warms up, and where its lengths are from."""
    if name == "trace":
        trace = open_trace(args.trace).first(args.trace_requests).scaled(args.divisor)
        lengths, source = (trace.context.tolist(), trace.generated.tolist()), trace.source
    else:
        lengths = [args.prompt_tokens] * args.requests, [args.new_tokens] * args.requests
        source = f"{args.requests} x ({args.prompt_tokens} + {args.new_tokens})"
    vocabulary = SHAPES[args.shape].vocabulary
    return [make_work(*lengths, vocabulary, seed) for seed in range(args.rounds + 1)], source


def batch_grid(args: argparse.Namespace) -> list[BatchSettings]:
    """Settings of transformers' continuous batching to try; on a GPU with FlashAttention first."""
    flash = [None] if args.device == "cpu" else [True, False]
    return [
        BatchSettings(page, max(tokens, args.sequences), args.sequences, choice)
        for page, tokens, choice in itertools.product(args.batch_pages, args.batch_tokens, flash)
    ]


class _Run:
    """One workload, and where its results go."""

    def __init__(self, name: str, args: argparse.Namespace, out: Partial, place: Path) -> None:
        self.name = name
        self.args = args
        self.out = out
        self.works, self.source = make_rounds(name, args)
        self.largest = self.works[0]
        positions = 2 * max(self.largest.totals)
        self.model = build_model(
            SHAPES[args.shape],
            args.device,
            DTYPES[args.dtype],
            positions,
            initializer_range=DECISIVE,
        )
        self.tried: list[Json] = []

        @cache
        def directory() -> str:
            save_model(self.model, place)
            return str(place)

        @cache
        def batch() -> BatchSettings:
            chosen, self.tried = tune(self.model, batch_grid(args), self.largest)
            return chosen

        self.directory, self.batch = directory, batch

    def all(self, share: Share) -> None:
        """Every round that there is time for, one at least."""
        sides, about = self._open()
        turns = Turns(sides, self.args.device)
        self.out.append("workloads", self._about(about))
        before = self.out.results.get("throughput", [])
        try:
            for number, work in enumerate(self.works):
                if number > 1 and not share.allows(f"{self.name}, round {number}"):
                    break
                turns.round(number, work)
                timed = [name for name, taken in turns.taken.items() if taken.seconds]
                self.out.set(throughput=before + [self._row(turns, name) for name in timed])
        finally:
            turns.close()
        for name, why in turns.failed.items():
            self._absent(f"{name}, {self.name}", why)

    def _open(self) -> tuple[list[Side], Json]:
        """The sides that can be had, and what they say of themselves."""
        settings = engine_settings(self.args, self.model, self.largest)
        sides: list[Side] = []
        about: Json = {}
        for name in self.args.sides:
            try:
                side = open_side(
                    *(name, self.args, self.model, self.directory),
                    *(settings, self.batch, self.largest),
                )
            except Exception as error:  # whatever another library raises
                self._absent(name, _why(error))
                release(self.args.device)
            else:
                sides.append(side)
                about[name] = getattr(side, "about", None)
        return sides, {name: told for name, told in about.items() if told}

    def _absent(self, name: str, why: str) -> None:
        self.out.set(absent=self.out.results.get("absent", {}) | {name: why})

    def _about(self, sides: Json) -> Json:
        work = self.largest
        return {
            "workload": self.name,
            "lengths": self.source,
            "num_prompts": len(work),
            "total_input_tokens": sum(map(len, work.prompts)),
            "total_output_tokens": work.generated,
            "sides": sides,
            "generate_batch_settings": self.batch().as_json() if self.tried else None,
            "generate_batch_tried": [rounded(row) for row in self.tried],
        }

    def _row(self, turns: Turns, name: str) -> Json:
        taken, work = turns.taken[name], self.largest
        times = sorted(taken.seconds.values())
        median = times[len(times) // 2]
        ratio = turns.ratio(name)
        return rounded(
            {
                "workload": self.name,
                "side": name,
                "duration": median,
                "seconds": list(taken.seconds.values()),
                "request_throughput": len(work) / median,
                "output_throughput": work.generated / median,
                "total_token_throughput": sum(work.totals) / median,
                "equal_texts": taken.equal,
                "compared_texts": taken.compared,
                "ratio": None if ratio is None else ratio.as_json(),
            }
        )


def _why(error: Exception) -> str:
    text = str(error)
    known = isinstance(error, (ModuleNotFoundError, PeerError))
    return text if known else f"{type(error).__name__}: {text}"
