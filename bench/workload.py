"""Offline workloads through vattn.LLM, and the same requests through transformers.

    python -m bench.workload                        # on a GPU; small models on a CPU
    python -m bench.workload --parts nano,versus
    python -m bench.workload --parts served --concurrency 1,16,64

nano      nano-vllm's benchmark: 256 requests given to LLM.generate at once, prompts and answers of
          100 to 1024 tokens each, seed 0; Qwen3-0.6B's shape. Waiting for a place is part of TTFT
versus    requests like nano's through transformers' continuous batching, as generate_batch does it
          but with a manager that is made and warmed up beforehand, and through LLM.generate, both
          after a round of other requests, one side after the other with the device to itself. The
          number of requests doubles as long as a round fits into --versus-s; rounds of the last
          number count, up to three, each with other requests: the ratio is the median of theirs.
          transformers chooses its settings itself and takes FlashAttention where it finds it; the
          attention that each side ran is in the result
served    Llama-3-8B's shape, so many requests at a time: who ends is replaced by the next

Greedy, random weights, every request as long as asked for. TTFT: from arrival to the first token;
TPOT: (last - first token) / (tokens - 1); p99 only of 20 or more. --budget-s ends what runs (its
tokens count until then) and leaves out what is to come, which is listed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from bench.common import Budget, Json, Target, counts, print_table
from bench.model_args import model_parser, names, parse, release, settings_of
from bench.offline_sides import GenerateBatch, Work
from bench.partial import Partial
from bench.served import how_it_ran, serve_all, serve_closed, uniform_work
from bench.shapes import DTYPES, SHAPES, build_model
from bench.transformers_side import (
    compared,
    open_transformers,
    settings_for,
    transformers_round,
)
from vattn import LLM

PARTS = ("nano", "versus", "served")
DEFAULTS: dict[str, Json] = {
    "cuda": {
        "shape": "llama3-8b",
        "nano_shape": "qwen3-0.6b",
        "dtype": "bfloat16",
        "requests": 256,
        "lengths": [100, 1024],
        "concurrency": [1, 16, 64],
        "sequences": 256,
        "versus_s": 25.0,
    },
    "cpu": {
        "shape": "small-llama",
        "nano_shape": "tiny-qwen3",
        "dtype": "float32",
        "requests": 32,
        "lengths": [8, 64],
        "concurrency": [1, 4],
        "sequences": 16,
        "versus_s": 10.0,
    },
}
# Requests of `served`, per sequence at a time: enough that most of them run beside all others.
_TURNS = 2
_LEAST_REQUESTS = 8
_SAMPLES = 3  # rounds of `versus` that count, at most
_WARMUP_REQUESTS = 8


def open_llm(args: argparse.Namespace, shape: str, sequences: int, longest: int) -> LLM:
    """An engine for a shape."""
    model = build_model(SHAPES[shape], args.device, DTYPES[args.dtype], longest)
    options: Json = {} if args.backend is None else {"attention_backend": args.backend}
    if args.compile is not None:
        options["compile_model"] = args.compile
    return LLM(
        model, skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=sequences, **options
    )


class Workload:
    """The parts of one run, and where their results go."""

    def __init__(self, args: argparse.Namespace, out: Partial, budget: Budget) -> None:
        self.args = args
        self.out = out
        self.budget = budget
        self._llm: LLM | None = None
        self._llm_shape = ""

    def work(self, shape: str, requests: int, seed: int) -> Work:
        """So many requests for a shape; no two seeds begin alike."""
        return uniform_work(requests, self.args.lengths, SHAPES[shape].vocabulary, seed)

    @property
    def longest(self) -> int:
        """Tokens of a request at its end, at most."""
        return 2 * int(self.args.lengths[1])

    def left_s(self) -> float | None:
        """Seconds that are left of the budget; None without one."""
        return None if self.budget.seconds is None else self.budget.seconds - self.budget.spent_s

    def llm(self, shape: str, sequences: int) -> LLM:
        """The engine for a shape, warm; the one before is closed if it is for another."""
        if self._llm is None or self._llm_shape != shape:
            self.close()
            self._llm = open_llm(self.args, shape, sequences, self.longest)
            self._llm_shape = shape
            serve_all(self._llm, self.work(shape, _WARMUP_REQUESTS, seed=1))
        return self._llm

    def close(self) -> None:
        """Closes the engine that is open."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None
            release(self.args.device)

    def nano(self) -> None:
        """256 requests at once."""
        args = self.args
        llm = self.llm(args.nano_shape, args.sequences)
        served = serve_all(llm, self.work(args.nano_shape, args.requests, seed=0))
        row = {"shape": args.nano_shape, **served.as_json(), **how_it_ran(llm.engine)}
        self.out.set(nano=row)

    def served(self) -> None:
        """So many requests at a time, for each concurrency."""
        args = self.args
        llm = self.llm(args.shape, max(args.concurrency))
        # The most first, since there is the most to be seen; one at a time takes longest.
        most_first = sorted(args.concurrency, reverse=True)
        for i, concurrency in enumerate(most_first):
            if not self.budget.allows(f"concurrency {concurrency}"):
                continue
            left = self.left_s()
            limit = None if left is None else left / (len(most_first) - i)
            requests = max(_LEAST_REQUESTS, _TURNS * concurrency)
            work = self.work(args.shape, requests, seed=10 + concurrency)
            served = serve_closed(llm.engine, work, concurrency, limit)
            row = {"shape": args.shape, **served.as_json(), **how_it_ran(llm.engine)}
            self.out.append("served", row)

    def versus(self) -> None:
        """Both sides, on the same requests."""
        args = self.args
        self.close()  # transformers sizes its cache by the memory that is free
        side, attention = open_transformers(
            args,
            settings_for(args.device, args.sequences),
            largest=self.work(args.nano_shape, args.requests, seed=0),
            warm_up=self.work(args.nano_shape, _WARMUP_REQUESTS, seed=1),
        )
        limit = args.versus_s
        if (left := self.left_s()) is not None:
            limit = min(limit, left / 2)
        try:
            works, theirs_s = self._rounds(side, limit)
        finally:
            side.close()
        del side
        release(args.device)
        llm = self.llm(args.nano_shape, args.sequences)
        # A round at least, the others while there is time.
        ours_s: list[float] = []
        for work in works:
            left = self.left_s()
            if not ours_s or left is None or left > ours_s[-1]:
                ours_s.append(serve_all(llm, work).seconds)
        row = compared(works, theirs_s, ours_s)
        row |= {"shape": args.nano_shape, "attention_of_transformers": attention}
        self.out.set(versus=row | how_it_ran(llm.engine))

    def _rounds(self, side: GenerateBatch, limit_s: float) -> tuple[list[Work], list[float]]:
        """Rounds of the most requests of nano's that transformers serves within the limit.

        Returns:
            The work of each, one at least, and the seconds of each.
        """
        args = self.args
        end = time.perf_counter() + limit_s
        requests, seed = min(16, args.requests), 1000
        while True:
            work = self.work(args.nano_shape, requests, seed)
            spent = transformers_round(side, work)
            # Twice the requests take at most twice as long.
            if requests == args.requests or time.perf_counter() + 2 * spent > end:
                break
            requests, seed = min(2 * requests, args.requests), seed + 1
        works, times = [work], [spent]
        while len(works) < _SAMPLES and time.perf_counter() + max(times) < end:
            # Nobody has seen these either: no side finds a prefix in its cache.
            works.append(self.work(args.nano_shape, requests, seed + len(works)))
            times.append(transformers_round(side, works[-1]))
        return works, times

    def all(self) -> None:
        """The parts there is time for."""
        for part in self.args.parts:
            if self.budget.allows(part):
                print(f"{self.budget.spent_s:5.0f} s  {part}", flush=True)
                with self.out.part(part):
                    getattr(self, part)()
        self.close()
        self.out.set(cut_for_time=self.budget.cut, seconds=self.budget.spent_s)


# Output -------------------------------------------------------------------------------------------


def print_results(results: Json) -> None:
    served = [*results.get("served", ())]
    if "nano" in results:
        served = [results["nano"], *served]
    print_table(
        "requests through vattn.LLM",
        [
            *("shape", "at a time", "ended", "s", "tok/s", "with prompts"),
            *("TTFT p50 ms", "p99", "TPOT p50 ms", "p99"),
        ],
        [
            [
                *(r[key] for key in ("shape", "concurrency", "requests_ended", "seconds")),
                *(r["tokens_per_s"], r["total_tokens_per_s"]),
                *(r[what][q] for what in ("ttft_ms", "tpot_ms") for q in ("p50", "p99")),
            ]
            for r in served
        ],
    )
    if "versus" in results:
        r = results["versus"]
        print_table(
            "the same requests, generated tokens per second",
            ["requests", "rounds", "transformers", "its attention", "vattn", "ratio"],
            [
                [
                    *(r["requests"], r["rounds"], r["transformers_tokens_per_s"]),
                    *(r["attention_of_transformers"], r["vattn_tokens_per_s"], r["ratio"]),
                ]
            ],
        )
    if results["cut_for_time"]:
        print(f"no time for: {', '.join(results['cut_for_time'])}")


def make_targets(args: argparse.Namespace, results: Json) -> list[Target]:
    """Of the shape and device that the limit is for."""
    if (args.nano_shape, args.device) != ("qwen3-0.6b", "cuda") or "versus" not in args.parts:
        return []
    found = results.get("versus", {})
    note = ""
    if found:
        note = f"{found['rounds']} x {found['requests']} requests, transformers with "
        note += found["attention_of_transformers"]
    name = "tokens/s over transformers' generate_batch"
    return [Target(name, found.get("ratio"), 3.0, "x", at_least=True, note=note)]


def main(argv: Sequence[str] | None = None) -> int:
    cli = model_parser("bench.workload", __doc__)
    cli.add_argument("--parts", type=names(PARTS), default=list(PARTS), metavar="LIST")
    cli.add_argument("--nano-shape", choices=sorted(SHAPES), help="of nano and versus")
    cli.add_argument("--requests", type=int, help="of nano, and at most of versus")
    cli.add_argument("--lengths", type=counts, metavar="LOW,HIGH", help="of prompts and answers")
    cli.add_argument("--concurrency", type=counts, metavar="LIST", help="of served")
    cli.add_argument("--sequences", type=int, help="at once, in nano and versus")
    cli.add_argument("--versus-s", type=float, help="seconds for the rounds of transformers")
    cli.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the model")
    args = parse(cli, argv, DEFAULTS)
    if len(args.lengths) != 2 or args.lengths[0] > args.lengths[1]:
        cli.error(f"--lengths {args.lengths} must be the shortest and the longest: 100,1024")
    out = Partial(args.json, "workload", settings_of(args), lambda found: make_targets(args, found))
    Workload(args, out, Budget(args.budget_s)).all()
    print_results(out.results)
    return out.end(rows=PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
