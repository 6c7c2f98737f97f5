"""Offline throughput: vattn.LLM against what transformers has; their tokens are compared.

    python -m bench.offline                       # 64 requests of 64 prompt and 64 new tokens
    python -m bench.offline --trace conv.csv.gz   # its first 128 requests, lengths / 8
    python -m bench.offline --trace               # lengths drawn like those of the trace
    python -m bench.offline --small               # in seconds, to see that it runs

A 4-layer 256-wide Llama with random weights, fp32, greedy. The sides take turns, every round has
new prompts (so nobody finds a prefix of the round before), and a ratio is the median over the
rounds: above 1, vattn is faster.

    generate_batch   transformers' continuous batching as a call: its manager is made for the work,
                     with the settings that are the fastest of a grid, tried before on this machine
    batch defaults   the same with its own settings, which reserve most of the memory at each call;
                     only when asked for with --sides
    manager          as generate_batch, with a manager that is made once and kept, as vattn's engine
    padded           generate() on batches, by arrival
    padded sorted    the same on batches of similar answers, as if lengths were known (trace only)
    single           generate() on one request at a time, in the first round: the reference
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from bench.common import (
    Json,
    Target,
    counts,
    parser,
    print_table,
    print_targets,
    report,
    summarize_pairs,
    write_json,
)
from bench.offline_sides import (
    BatchSettings,
    GenerateBatch,
    Padded,
    Side,
    Vattn,
    Work,
    make_llama,
    make_work,
    tune,
)
from bench.trace import draw_trace, read_trace

SIDES = ("vattn", "generate_batch", "batch defaults", "manager", "padded", "padded sorted")
ORDINARY = [side for side in SIDES if side != "batch defaults"]
Rounds = list[Work]


def make_rounds(args: argparse.Namespace) -> tuple[Rounds, str]:
    """The work of each round, the first of which is for warming up, and where its lengths are from.

    Lengths are the same in every round.
    """
    if args.trace is None:
        lengths = [args.prompt_tokens] * args.requests, [args.new_tokens] * args.requests
        source = f"{args.requests} x ({args.prompt_tokens} + {args.new_tokens})"
    else:
        trace = draw_trace() if args.trace == "" else read_trace(Path(args.trace))
        trace = trace.first(args.requests).scaled(args.divisor)
        lengths, source = (trace.context.tolist(), trace.generated.tolist()), trace.source
    works = [make_work(*lengths, args.vocabulary, seed) for seed in range(args.rounds + 1)]
    return works, source


def make_sides(
    args: argparse.Namespace, model: LlamaForCausalLM, settings: BatchSettings, work: Work
) -> list[Side]:
    options = {"max_num_seqs": args.sequences}
    if args.step_tokens:
        options["max_num_batched_tokens"] = args.step_tokens
    positions = max(work.totals)
    makers: dict[str, Callable[[], Side]] = {
        "vattn": lambda: Vattn(model, positions, **options),
        "generate_batch": lambda: GenerateBatch(model, settings, "generate_batch"),
        "batch defaults": lambda: GenerateBatch(model, None, "batch defaults"),
        "manager": lambda: GenerateBatch(model, settings, "manager", keep=work),
        "padded": lambda: Padded(model, args.sequences, "padded"),
        "padded sorted": lambda: Padded(model, args.sequences, "padded sorted", by_length=True),
    }
    names = [name for name in args.sides if args.trace is not None or name != "padded sorted"]
    return [makers[name]() for name in names]


class Turns:
    """Lets every side do the work of a round, in an order that rotates."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        self.texts: dict[str, list[list[int]]] = {}
        self.equal: dict[str, int] = dict.fromkeys(self.seconds, 0)
        self.compared = 0
        self._round = 0

    def take(self, work: Work, *, timed: bool) -> None:
        shift = self._round % len(self.sides)
        self._round += 1
        for side in [*self.sides[shift:], *self.sides[:shift]]:
            start = time.perf_counter()
            self.texts[side.name] = side.run(work)
            spent = time.perf_counter() - start
            got = [len(text) for text in self.texts[side.name]]
            assert got == work.new_tokens, f"{side.name} gave other lengths than asked for"
            if timed:
                self.seconds[side.name].append(spent)

    def compare(self, reference: list[list[int]]) -> None:
        """Counts the texts of the round that equal the reference's."""
        self.compared += len(reference)
        for name, texts in self.texts.items():
            self.equal[name] += sum(a == b for a, b in zip(texts, reference, strict=True))


def run(args: argparse.Namespace) -> Json:
    works, source = make_rounds(args)
    first = works[0]
    head_dim = 64 if args.width % 64 == 0 else args.width // 2
    model = make_llama(args.layers, args.width, head_dim, args.vocabulary, 2 * max(first.totals))
    grid = [
        BatchSettings(page, tokens, args.sequences)
        for page, tokens in itertools.product(args.batch_pages, args.batch_tokens)
        if tokens >= args.sequences
    ]
    settings, tried = tune(model, grid, first)
    sides = make_sides(args, model, settings, first)
    turns = Turns(sides)
    single = Padded(model, 1, "single")
    turns.take(first, timed=False)
    start = time.perf_counter()
    reference = single.run(first)
    single_s = time.perf_counter() - start
    turns.compare(reference)
    for work in works[1:]:
        turns.take(work, timed=True)
        if "padded" in turns.texts:
            turns.compare(turns.texts["padded"])
    for side in sides:
        side.close()
    return {
        "lengths": source,
        "requests": len(first),
        "generated_tokens": first.generated,
        "generate_batch_settings": settings.as_json(),
        "generate_batch_tried": tried,
        "single_tokens_per_s": first.generated / single_s,
        "sides": {
            side.name: {
                "seconds": turns.seconds[side.name],
                "tokens_per_s": first.generated / statistics.median(turns.seconds[side.name]),
                "equal_texts": turns.equal[side.name],
                "compared_texts": turns.compared,
            }
            for side in sides
        },
        "ratios": {
            side.name: asdict(summarize_pairs(turns.seconds[side.name], turns.seconds["vattn"]))
            for side in sides
            if side.name != "vattn" and "vattn" in turns.seconds
        },
    }


def print_results(found: Json) -> None:
    if found["generate_batch_tried"]:
        print_table(
            "settings of generate_batch tried",
            ["page_size", "max_batch_tokens", "max_requests", "tokens/s"],
            [list(tried.values()) for tried in found["generate_batch_tried"]],
        )
    rows = []
    for name, side in found["sides"].items():
        ratio = found["ratios"].get(name)
        equal = f"{side['equal_texts']}/{side['compared_texts']}"
        spread: list[object] = [None, None]
        if ratio is not None:
            spread = [ratio["ratio"], f"{ratio['ratio_low']:.2f}-{ratio['ratio_high']:.2f}"]
        rows.append([name, side["tokens_per_s"], *spread, equal])
    rows.append(["single (one round)", found["single_tokens_per_s"], None, None, "reference"])
    print_table(
        f"{found['lengths']}: generated tokens per second, and vattn's ratio",
        ["side", "tokens/s", "vattn is x", "quartiles", "equal texts"],
        rows,
    )


def make_targets(found: Json, trace: bool) -> list[Target]:
    if "vattn" not in found["sides"]:
        return []
    targets = []
    limits = {"generate_batch": 4.0, "padded": 1.5 if trace else 1.0}
    for name, limit in limits.items():
        ratio = found["ratios"].get(name, {}).get("ratio")
        targets.append(Target(f"throughput over {name}", ratio, limit, "x", at_least=True))
    side = found["sides"]["vattn"]
    share = side["equal_texts"] / side["compared_texts"]
    targets.append(Target("texts equal to generate's", share, 1, "", at_least=True))
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.offline", __doc__)
    cli.add_argument("--small", action="store_true", help="few requests and layers, for CI")
    cli.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="lengths of a trace (csv or csv.gz); without FILE they are drawn",
    )
    cli.add_argument("--divisor", type=int, default=8, help="of a trace's lengths")
    cli.add_argument("--requests", type=int, help="default 64, with --trace 128")
    cli.add_argument("--prompt-tokens", type=int, default=64)
    cli.add_argument("--new-tokens", type=int, default=64)
    cli.add_argument("--sequences", type=int, default=64, help="at once, and rows of a batch")
    cli.add_argument("--step-tokens", type=int, help="max_num_batched_tokens of vattn")
    cli.add_argument("--rounds", type=int, default=7)
    cli.add_argument("--layers", type=int, default=4)
    cli.add_argument("--width", type=int, default=256)
    cli.add_argument("--vocabulary", type=int, default=4096)
    cli.add_argument("--batch-pages", type=counts, default=[16, 32, 256])
    cli.add_argument("--batch-tokens", type=counts, default=[256, 1024, 4096])
    cli.add_argument("--sides", nargs="+", choices=SIDES, default=ORDINARY)
    args = cli.parse_args(argv)
    args.requests = args.requests or (64 if args.trace is None else 128)
    if args.small:
        args.requests, args.sequences, args.rounds = min(args.requests, 6), 4, 1
        args.prompt_tokens, args.new_tokens, args.divisor = 12, 6, 64
        args.layers, args.width, args.vocabulary = 2, 64, 256
        args.batch_pages, args.batch_tokens = [16], [64]
    found = run(args)
    print_results(found)
    targets = [] if args.small else make_targets(found, args.trace is not None)
    print_targets(targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings["trace"] = Path(args.trace).name if args.trace else args.trace
        settings["threads"] = torch.get_num_threads()
        write_json(args.json, report("offline", settings, found, targets))
    vattn = found["sides"].get("vattn")
    return 0 if vattn is None or vattn["equal_texts"] == vattn["compared_texts"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
