"""What the server costs beside the engine: the same requests offline, and over HTTP.

    python -m bench.serving --json results/server.json
    python -m bench.serving --small               # to see that it runs

A Llama with random weights in fp32 on a CPU. Each round has prompts of its own, and three sides
serve them in turns, each in processes of its own:

    offline  vattn.LLM.generate, all prompts in one call
    raw      the server (uvicorn, its engine process), all prompts as streams of /v1/completions,
             read by one thread from plain sockets
    openai   the same, read by the `openai` package's asynchronous client

The rate of a side is tokens over seconds from the first request to the last token, and its ratio
to offline the median over rounds. The engine has the same number of threads on all sides; the
server and the client share the machine with it.

Requests that come over sockets make other batches, whose products are rounded differently. Where
two tokens are equally likely but for that, a text may go on with the other one; any other
difference of texts is an error, and so are more than a few.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from bench.common import (
    Json,
    Target,
    parser,
    print_table,
    print_targets,
    report,
    summarize_pairs,
    write_json,
)
from bench.model_args import quantiles
from bench.offline_sides import make_work
from bench.server_sides import Program, save_model

SIDES = ("offline", "raw", "openai")
LEAST = 0.85  # of offline's throughput, for raw
TIE = 1e-3  # of two logits, whose deviation is about 1: what rounding may turn around
MOST_TIES = 0.05  # of a side's texts

Side = Callable[[Json], Json]


def measure(args: argparse.Namespace) -> list[Json]:
    """All sides, in turns; the first round is for warming up.

    Raises:
        RuntimeError: a side has ended.
        AssertionError: texts differ by more than rounding, or a request failed.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        positions = args.prompt_tokens + args.new_tokens + 16
        vocabulary = save_model(Path(folder), args.layers, args.width, positions)
        options = json.dumps({"max_num_seqs": args.streams, "max_model_len": positions})

        def program(module: str, *arguments: str) -> Program:
            return stack.enter_context(Program(module, *arguments, threads=args.threads))

        offline = program("bench.server_children", "offline", folder, options)
        server = program("bench.server_children", "server", folder, options)
        client = program("bench.server_clients", server.hello["ready"])
        sides: Mapping[str, Side] = {
            "offline": offline.ask,
            "raw": lambda question: client.ask(question | {"client": "raw"}),
            "openai": lambda question: client.ask(question | {"client": "openai"}),
        }
        rounds = []
        for i in range(args.rounds + 1):
            found = play(sides, args, vocabulary, i)
            if i:
                rounds.append(found)
    return [summary(name, rounds, args) for name in SIDES]


def play(sides: Mapping[str, Side], args: argparse.Namespace, vocabulary: int, i: int) -> Json:
    """One round of all sides, each time another one first."""
    lengths = [args.prompt_tokens] * args.streams
    work = make_work(lengths, [args.new_tokens] * args.streams, vocabulary, seed=i)
    question = {"prompts": work.prompts, "new_tokens": args.new_tokens}
    found = {}
    for k in range(len(SIDES)):
        name = SIDES[(i + k) % len(SIDES)]
        found[name] = sides[name](question)
    texts = found["offline"]["texts"]
    for name in SIDES:
        other = found[name]["texts"]
        assert len(other) == len(texts), f"{name} has {len(other)} texts"
        different = [k for k in range(len(texts)) if other[k] != texts[k]]
        for k in different:
            asked = {"prompt": work.prompts[k], "new_tokens": args.new_tokens, "other": other[k]}
            gap = sides["offline"](asked)["gap"]
            assert gap is not None, f"{name} has a text that offline does not depart from: {k}"
            assert gap <= TIE, f"{name} has another text, and no tie: {gap}"
        found[name]["ties"] = len(different)
    return found


def summary(name: str, rounds: Sequence[Json], args: argparse.Namespace) -> Json:
    """A side's rate, its ratio to offline of the same round, and its latencies in ms."""
    mine = [found[name] for found in rounds]
    ties = sum(each["ties"] for each in mine) / (len(rounds) * args.streams)
    assert ties <= MOST_TIES, f"{name} has other texts in {ties:.1%} of streams"
    seconds = [each["seconds"] for each in mine]
    pairs = summarize_pairs([found["offline"]["seconds"] for found in rounds], seconds)
    return {
        "side": name,
        "tokens_per_s": args.streams * args.new_tokens / statistics.median(seconds),
        "seconds": seconds,
        "of_offline": asdict(pairs),
        "equal_texts": 1 - ties,
        "ttft_ms": quantiles([s for each in mine for s in each["first_token_s"]], 1e-3),
        "itl_ms": quantiles([s for each in mine for s in each["gaps_s"]], 1e-3),
    }


def print_results(results: Sequence[Json]) -> None:
    rows = []
    for r in results:
        pairs = r["of_offline"]
        rows.append(
            [
                *(r["side"], f"{r['tokens_per_s']:.0f}", f"{pairs['ratio']:.3f}"),
                f"{pairs['ratio_low']:.3f}-{pairs['ratio_high']:.3f}",
                f"{r['equal_texts']:.1%}",
                *(r[what][q] for what in ("ttft_ms", "itl_ms") for q in ("p50", "p99")),
            ]
        )
    print_table(
        "tokens/s; ratio to offline of the same round (median, quartiles); ms",
        ["side", "tokens/s", "ratio", "quartiles", "equal", "TTFT p50", "p99", "ITL p50", "p99"],
        rows,
    )


def make_targets(results: Sequence[Json]) -> list[Target]:
    ratio = {r["side"]: r["of_offline"]["ratio"] for r in results}
    note = f"by the openai client {ratio['openai']:.3f}"
    return [Target("server / offline, plain sockets", ratio["raw"], LEAST, "x", True, note)]


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.serving", __doc__)
    cli.add_argument("--small", action="store_true", help="few layers, streams and tokens, for CI")
    cli.add_argument("--streams", type=int)
    cli.add_argument("--rounds", type=int)
    cli.add_argument("--prompt-tokens", type=int)
    cli.add_argument("--new-tokens", type=int)
    cli.add_argument("--layers", type=int)
    cli.add_argument("--width", type=int)
    cli.add_argument("--threads", type=int, help="of torch; default: its own choice")
    args = cli.parse_args(argv)
    full = {"streams": 32, "rounds": 5, "prompt_tokens": 32, "new_tokens": 64}
    full |= {"layers": 8, "width": 512, "threads": torch.get_num_threads()}
    small = {"streams": 4, "rounds": 1, "new_tokens": 8, "layers": 1, "width": 128}
    for name, value in (full | (small if args.small else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif getattr(args, name) < 1:
            cli.error(f"--{name.replace('_', '-')} {getattr(args, name)} has to be at least 1")
    results = measure(args)
    print_results(results)
    targets = [] if args.small else make_targets(results)
    print_targets(targets)
    if args.json is not None:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        write_json(args.json, report("server", settings, results, targets))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
