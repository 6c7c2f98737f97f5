"""Time to the first token of a request whose prefix is cached, against that of the first request.

    python -m bench.prefix             # 8-layer 512-wide Llama, fp32, prefixes of 4096 tokens
    python -m bench.prefix --small     # in seconds, to see that it runs

For each of several prefixes: one request with the prefix alone, then one with the same prefix and
16 new tokens, right after it. Both ask for one token, so the time of the call is the time to the
first token. The ratio is the second's time over the first's. An engine without prefix caching
answers the second request, too: its token has to be the same, and its time is what is saved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.common import (
    Json,
    Target,
    parser,
    print_table,
    print_targets,
    quartiles,
    report,
    write_json,
)
from bench.offline_sides import PAD, make_llama

HEAD_DIM = 64


class Engine:
    """`vattn.LLM` for one token at a time."""

    def __init__(
        self, model: Any, positions: int, step_tokens: int | None, *, cached: bool
    ) -> None:
        from vattn import LLM

        options: dict[str, Any] = {"max_num_batched_tokens": step_tokens} if step_tokens else {}
        self.llm = LLM(
            model=model,
            dtype="float32",
            max_model_len=positions,
            max_num_seqs=4,
            enable_prefix_caching=cached,
            skip_tokenizer_init=True,
            **options,
        )

    def first_token(self, prompt: list[int]) -> tuple[float, int, int]:
        """Seconds to the first token, that token, and how many of the prompt's were cached."""
        from vattn import SamplingParams

        start = time.perf_counter()
        (output,) = self.llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        (token,) = output.outputs[0].token_ids
        return seconds, token, output.num_cached_tokens


def run(args: argparse.Namespace) -> Json:
    """All prefixes, one after the other; the first engine call is not counted."""
    positions = args.tokens + args.new_tokens + 1
    random = np.random.default_rng(0)

    def draw(n: int) -> list[int]:
        ids: list[int] = random.integers(PAD + 1, args.vocabulary, n).tolist()
        return ids

    model = make_llama(args.layers, args.width, HEAD_DIM, args.vocabulary, 2 * positions)
    cached = Engine(model, positions, args.step_tokens, cached=True)
    # A model of its own with the same weights: an engine may change the model it is given.
    twin = make_llama(args.layers, args.width, HEAD_DIM, args.vocabulary, 2 * positions)
    plain = Engine(twin, positions, args.step_tokens, cached=False)
    for engine in (cached, plain):
        engine.first_token(draw(args.tokens))
    rows = []
    for _ in range(args.prefixes):
        prefix, more = draw(args.tokens), draw(args.new_tokens)
        first_s, _, first_hit = cached.first_token(prefix)
        second_s, token, hit = cached.first_token(prefix + more)
        plain_s, plain_token, _ = plain.first_token(prefix + more)
        rows.append(
            {
                "first_s": first_s,
                "second_s": second_s,
                "second_uncached_s": plain_s,
                "ratio": second_s / first_s,
                "first_cached_tokens": first_hit,
                "second_cached_tokens": hit,
                "token_equal": token == plain_token,
            }
        )
    for engine in (cached, plain):
        engine.llm.close()
    ratios = [row["ratio"] for row in rows]
    low, high = quartiles(ratios)
    return {
        "prefixes": rows,
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser("bench.prefix", __doc__)
    cli.add_argument("--small", action="store_true", help="short prefixes, few layers, for CI")
    cli.add_argument("--tokens", type=int, default=4096, help="of a prefix")
    cli.add_argument("--new-tokens", type=int, default=16)
    cli.add_argument("--prefixes", type=int, default=9)
    cli.add_argument("--layers", type=int, default=8)
    cli.add_argument("--width", type=int, default=512)
    cli.add_argument("--vocabulary", type=int, default=4096)
    cli.add_argument("--step-tokens", type=int, help="max_num_batched_tokens")
    args = cli.parse_args(argv)
    if args.small:
        args.tokens, args.prefixes, args.layers, args.width = min(args.tokens, 96), 2, 2, 128
    found = run(args)
    print_table(
        f"time to the first token: {args.tokens} tokens, then the same and {args.new_tokens} new",
        ["first ms", "second ms", "uncached ms", "ratio", "cached tokens", "equal"],
        [
            [
                *(f"{1e3 * row[key]:.1f}" for key in ("first_s", "second_s", "second_uncached_s")),
                *(row["ratio"], row["second_cached_tokens"], row["token_equal"]),
            ]
            for row in found["prefixes"]
        ],
    )
    equal = all(row["token_equal"] for row in found["prefixes"])
    targets = [
        Target("second / first time to first token", found["ratio"], 0.05, "x", at_least=False),
        Target("tokens equal", float(equal), 1, "", at_least=True),
    ]
    targets = [] if args.small else targets
    print_targets(targets)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings["threads"] = torch.get_num_threads()
        write_json(args.json, report("prefix", settings, found, targets))
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
