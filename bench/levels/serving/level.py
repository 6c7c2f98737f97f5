"""Requests that arrive in time: what they wait for on contiguous and on paged memory.

    python -m bench serving
    python -m bench serving --trace conv.csv.gz     # its lengths, and the moments of its requests
    python -m bench serving --loads chat --goodput ttft:500 tpot:50

Open loop: a request is sent when it is due, whoever is late. Latencies count from that moment, so
that a side cannot hide a wait by being late. Rates are fractions of what the contiguous side serves
offline here, and both sides get the same ones, in windows that take turns, with the same arrivals,
prompts and parameters. Limits of goodput that are not given are a multiple of what an unloaded
engine takes, on the slower side. Unless the paged side names a block size, it is the fastest of a
short sweep.

    random   lengths drawn evenly; no prompt begins like another
    trace    lengths of a trace, divided; with --trace the moments of its requests, time scaled
    chat     conversations: each turn begins with the turns before it, which the cache should have
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from bench.common import Json, Target, counts
from bench.levels.block_sweep import measured_side
from bench.levels.budget_share import Share
from bench.levels.engines import (
    EngineSettings,
    Side,
    contiguous_for,
    how_it_ran,
    kv_budget,
    open_sides,
    parse_side,
)
from bench.levels.level import Level
from bench.levels.serving import tables as serving_tables
from bench.levels.serving.loads import LOADS, Load, longest, make_load
from bench.levels.serving.metrics import GoodputAction, Limits, parse_goodput
from bench.levels.serving.windows import BASE, CANDIDATE, Turns, capacity, serve_window, unloaded
from bench.levels.table import Table
from bench.model_args import names, release
from bench.offline_sides import DECISIVE
from bench.partial import Partial
from bench.served import serve_all, uniform_work
from bench.shapes import DTYPES, SHAPES, build_model
from vattn import LLM

_WARMUP_REQUESTS = 4
_LATENCY_REQUESTS = 5  # alone, to see what an unloaded engine takes
_MODEL_SLACK_TOKENS = 32


class Serving(Level):
    """See the module."""

    name = "serving"
    summary = __doc__ or ""
    rows = ("rates",)
    defaults: ClassVar[Mapping[str, Json]] = {
        "cpu": {
            "shape": "small-llama",
            "dtype": "float32",
            "contiguous": "contiguous",
            "paged": "paged",
            "loads": list(LOADS),
            "load_factors": [0.5, 0.8, 1.1],
            "num_prompts": 40,
            "repeats": 3,
            "prompt_tokens": [128, 512],
            "new_tokens": [32, 96],
            "divisor": 4,
            "turns": 4,
            "turn_tokens": 96,
            "answer_tokens": 32,
            "sequences": 16,
            "burstiness": 1.0,
            "goodput_factor": 5.0,
            "seed": 0,
            "budget_s": 290.0,
        },
        "cuda": {
            "shape": "llama3-8b",
            "dtype": "bfloat16",
            "contiguous": "contiguous",
            "paged": "paged",
            "loads": list(LOADS),
            "load_factors": [0.5, 0.8, 1.1],
            "num_prompts": 96,
            "repeats": 3,
            "prompt_tokens": [256, 2048],
            "new_tokens": [32, 160],
            "divisor": 1,
            "turns": 6,
            "turn_tokens": 384,
            "answer_tokens": 128,
            "sequences": 64,
            "burstiness": 1.0,
            "goodput_factor": 5.0,
            "seed": 0,
            "budget_s": 480.0,
        },
    }
    small: ClassVar[Json] = {
        "shape": "tiny-llama",
        "load_factors": [0.8],
        "num_prompts": 8,
        "repeats": 1,
        "prompt_tokens": [16, 48],
        "new_tokens": [4, 8],
        "divisor": 32,
        "turns": 2,
        "turn_tokens": 64,
        "answer_tokens": 8,
        "sequences": 4,
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        cli.add_argument("--shape", choices=sorted(SHAPES), help="of the model")
        cli.add_argument("--dtype", choices=sorted(DTYPES))
        for kind, form in ((CANDIDATE, "[:backend]"), (BASE, "[:kernel[:block tokens]]")):
            cli.add_argument(f"--{kind}", type=_side(kind), metavar="SIDE", help=f"{kind}{form}")
        cli.add_argument("--loads", type=names(LOADS), metavar="LIST")
        cli.add_argument("--load-factors", type=_factors, metavar="LIST", help="of the capacity")
        cli.add_argument("--num-prompts", type=_positive, help="requests of a window")
        cli.add_argument("--repeats", type=_positive, help="windows of each side, of a rate")
        cli.add_argument("--prompt-tokens", type=_span, metavar="LOW,HIGH", help="random")
        cli.add_argument("--new-tokens", type=_span, metavar="LOW,HIGH", help="random")
        cli.add_argument("--trace", type=Path, metavar="FILE", help="csv or csv.gz")
        cli.add_argument("--divisor", type=_positive, help="of a trace's lengths")
        cli.add_argument("--turns", type=_positive, help="of a conversation")
        cli.add_argument("--turn-tokens", type=_positive, help="that each turn of chat adds")
        cli.add_argument("--answer-tokens", type=_positive, help="of each answer of chat")
        cli.add_argument("--sequences", type=_positive, help="that run at once")
        cli.add_argument("--burstiness", type=_positive_float, help="1 is Poisson, less in bursts")
        cli.add_argument(
            "--goodput",
            nargs="+",
            action=GoodputAction,
            metavar="NAME:MS",
            help="limits of a request, of ttft, tpot, e2el, for request_goodput",
        )
        cli.add_argument("--goodput-factor", type=_positive_float, help="of unloaded latencies")
        cli.add_argument("--seed", type=int)

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        with ExitStack() as stack:
            _Run(args, out, _open(args, out, stack)).all()
        release(args.device)

    def tables(self, results: Json) -> list[Table]:
        return serving_tables.tables(results)

    def targets(self, settings: Json, results: Json) -> list[Target]:
        del settings
        rows = results.get("rates", [])
        if not rows:
            return []
        failed = sum(row["failed"] for row in rows)
        return [Target("requests that failed", failed, 0, "", at_least=False)]

    def draw(self, figure: Any, results: Json) -> bool:
        return serving_tables.draw(figure, results)


def _open(args: argparse.Namespace, out: Partial, stack: ExitStack) -> dict[str, LLM]:
    """The engines by their kind; the paged one is reported as absent if it cannot be had."""
    tokens = longest(args) + _MODEL_SLACK_TOKENS
    model = build_model(
        SHAPES[args.shape],
        args.device,
        DTYPES[args.dtype],
        tokens,
        initializer_range=DECISIVE,
    )
    # Room for all that run, and as much again for what is kept of those that have ended.
    budget = kv_budget(model, 2 * args.sequences * tokens)
    settings = EngineSettings(tokens, args.sequences, budget)
    out.set(model=SHAPES[args.shape].as_json(), kv_cache_bytes=budget)
    try:
        paged, tried = measured_side(
            *(parse_side(args.paged), model, args.shape), positions=tokens, sequences=args.sequences
        )
        if tried:
            out.set(blocks=tried)
        pair = [same_library(args, paged), str(paged)]
        sides = stack.enter_context(open_sides(pair, model, settings))
    except Exception as error:  # whatever a kernel library raises that does not fit
        out.set(absent={args.paged: f"{type(error).__name__}: {error}"})
        sides = stack.enter_context(open_sides([args.contiguous], model, settings))
    return {parse_side(name).kind: llm for name, llm in sides.items()}


def same_library(args: argparse.Namespace, paged: Side) -> str:
    """The contiguous side to compare: unless one is named, of the library that the paged one uses.

    Args:
        args: of the level.
        paged: the other side, with its kernel.
    """
    if args.device == "cpu" or parse_side(args.contiguous).kernel is not None:
        return str(args.contiguous)
    return str(contiguous_for(paged))


class _Run:
    """The loads of one run, and where their results go."""

    def __init__(self, args: argparse.Namespace, out: Partial, sides: dict[str, LLM]) -> None:
        self.args = args
        self.out = out
        self.sides = sides
        self.vocabulary = SHAPES[args.shape].vocabulary

    def all(self) -> None:
        args = self.args
        warm_up = uniform_work(_WARMUP_REQUESTS, (8, 16), self.vocabulary, seed=args.seed + 1)
        for llm in self.sides.values():
            serve_all(llm, warm_up)
        for i, name in enumerate(args.loads):
            if args.budget.allows(name):
                share = Share(args.budget, i, len(args.loads))
                with self.out.part(name):
                    load = make_load(name, args, self.vocabulary, self.sides[CANDIDATE])
                    self._load(load, share)
        self.out.set(sides={kind: how_it_ran(llm) for kind, llm in self.sides.items()})

    def _load(self, load: Load, share: Share) -> None:
        """Every rate of a load that there is time for, one at least."""
        offline = {kind: capacity(llm, load, self.args.repeats) for kind, llm in self.sides.items()}
        limits = self._limits(load)
        self.out.append(
            "loads",
            load.as_json() | {"offline_request_throughput": offline, "goodput_limits_ms": limits},
        )
        for i, factor in enumerate(self.args.load_factors):
            if i == 0 or share.allows(f"{load.name} at {factor:g}"):
                self._rate(load, factor, factor * offline[CANDIDATE], limits, share)

    def _limits(self, load: Load) -> Limits:
        """As given, else a multiple of what the slower side takes for a request alone."""
        if self.args.goodput:
            return parse_goodput(self.args.goodput)
        alone = [unloaded(llm, load, _LATENCY_REQUESTS, load.name) for llm in self.sides.values()]
        return {
            what: self.args.goodput_factor * max(each[f"median_{what}_ms"] for each in alone)
            for what in ("ttft", "tpot")
        }

    def _rate(self, load: Load, factor: float, rate: float, limits: Limits, share: Share) -> None:
        """The windows of one rate: sides take turns, and who is first changes."""
        turns, args = Turns(), self.args
        for repeat in range(args.repeats):
            if repeat and not share.allows(f"{load.name} at {factor:g}, window {repeat}"):
                break
            moments = load.arrivals(rate, args.burstiness, args.seed + repeat)
            order = sorted(self.sides, reverse=repeat % 2 == 1)
            for kind in order:
                name = f"{load.name}/{factor:g}/{repeat}"
                turns.add(kind, serve_window(self.sides[kind], load, moments, name))
        common: Json = {
            "load": load.name,
            "load_factor": factor,
            "request_rate": rate,
            "num_prompts": len(load.work),
        }
        for kind in self.sides:
            self.out.append("rates", common | {"side": kind} | turns.row(kind, limits))
        if BASE in self.sides:
            equal, compared = turns.equal_texts()
            pair: Json = {"ratios": turns.ratios(limits), "equal_texts": equal}
            self.out.append("pairs", common | pair | {"compared_texts": compared})


def _side(kind: str) -> Callable[[str], str]:
    """An argument type: a side of that kind, by its name."""

    def read(text: str) -> str:
        try:
            side = parse_side(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if side.kind != kind:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind} side")
        return str(side)

    return read


def _positive(text: str) -> int:
    values = counts(text)
    if len(values) != 1 or values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one number above 0")
    return values[0]


def _positive_float(text: str) -> float:
    return _factors(text)[0]


def _factors(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < float("inf") for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers above 0, such as 0.5,0.8")
    return found


def _span(text: str) -> list[int]:
    found = counts(text)
    if len(found) != 2 or not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not the least and the most, such as 128,512")
    return found
