"""What the requests of the serving level ask for: prompts, lengths, and who follows whom."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import Json
from bench.levels.arrivals import Moments, mean_rate, poisson_arrivals, trace_arrivals
from bench.offline_sides import Work, make_work
from bench.served import greedy
from bench.trace import draw_trace, read_moments, read_trace
from vattn import LLM

LOADS = ("random", "trace", "chat")


@dataclass(frozen=True)
class Load:
    """Requests in the order in which they arrive.

    Args:
        name: one of :data:`LOADS`.
        source: where the lengths are from.
        work: prompts and numbers of new tokens.
        moments: of the trace, in seconds; None where they are drawn.
    """

    name: str
    source: str
    work: Work
    moments: Moments | None = None

    def arrivals(self, rate_per_s: float, burstiness: float, seed: int) -> Moments:
        """Of all requests at this mean rate: drawn, or the trace's, its time scaled to the rate."""
        if self.moments is None:
            n = len(self.work)
            return poisson_arrivals(n, rate_per_s, burstiness=burstiness, seed=seed)
        return trace_arrivals(self.moments, rate_per_s / mean_rate(self.moments))

    def as_json(self) -> Json:
        prompts = [len(p) for p in self.work.prompts]
        return {
            "load": self.name,
            "source": self.source,
            "num_prompts": len(self.work),
            "prompt_tokens_mean": float(np.mean(prompts)),
            "prompt_tokens_max": max(prompts),
            "new_tokens_mean": float(np.mean(self.work.new_tokens)),
            "arrivals": "drawn" if self.moments is None else "of the trace, time scaled",
        }


def longest(args: argparse.Namespace) -> int:
    """Most tokens of a request at its end, over the loads asked for."""
    most = {
        "random": int(args.prompt_tokens[-1] + args.new_tokens[-1]),
        "chat": int(args.turns * (args.turn_tokens + args.answer_tokens)),
    }
    if "trace" in args.loads:
        most["trace"] = max(_trace_lengths(args)[0].totals)
    return max(most[name] for name in args.loads)


def make_load(name: str, args: argparse.Namespace, vocabulary: int, llm: LLM) -> Load:
    """A load by its name; ``llm`` rehearses conversations."""
    if name == "chat":
        return _chat(args, vocabulary, llm)
    if name == "trace":
        work, source = _trace_lengths(args, vocabulary)
        moments = None
        if args.trace is not None:
            moments = read_moments(args.trace)[: args.num_prompts]
        return Load(name, source, work, moments)
    random = np.random.default_rng(args.seed)
    lengths = [
        random.integers(low, high + 1, args.num_prompts).tolist()
        for low, high in (args.prompt_tokens, args.new_tokens)
    ]
    source = "{}-{} + {}-{} tokens, drawn evenly".format(*args.prompt_tokens, *args.new_tokens)
    return Load(name, source, make_work(lengths[0], lengths[1], vocabulary, args.seed))


def _trace_lengths(args: argparse.Namespace, vocabulary: int = 256) -> tuple[Work, str]:
    trace = draw_trace() if args.trace is None else read_trace(Path(args.trace))
    trace = trace.first(args.num_prompts).scaled(args.divisor)
    context, generated = trace.context.tolist(), trace.generated.tolist()
    return make_work(context, generated, vocabulary, args.seed), trace.source


def _chat(args: argparse.Namespace, vocabulary: int, llm: LLM) -> Load:
    """Conversations whose every turn begins with the turns before it, answers included.

    The answers are greedy, so they are known: an engine rehearses them before anything is timed.
    So requests can come when they are due, and need not wait for the answers before them. All
    conversations have their first turn, then all their second.
    """
    conversations = max(1, args.num_prompts // args.turns)
    asked = make_work(
        [args.turn_tokens] * conversations * args.turns,
        [0] * conversations * args.turns,
        vocabulary,
        args.seed,
    ).prompts
    histories: list[list[int]] = [[] for _ in range(conversations)]
    prompts: list[list[int]] = []
    for turn in range(args.turns):
        now = asked[turn * conversations : (turn + 1) * conversations]
        turns = [history + new for history, new in zip(histories, now, strict=True)]
        prompts += turns
        outputs = llm.generate(
            [{"prompt_token_ids": ids, "cache_salt": "rehearsal"} for ids in turns],
            greedy(args.answer_tokens),
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"the rehearsal of {len(failed)} turns failed: {failed[0]}")
        histories = [ids + a.token_ids for ids, a in zip(turns, answers, strict=True)]
    llm.reset_prefix_cache()
    source = (
        f"{conversations} conversations of {args.turns} turns, {args.turn_tokens} + "
        f"{args.answer_tokens} tokens each"
    )
    return Load("chat", source, Work(prompts, [args.answer_tokens] * len(prompts)))
