"""Prefill of one long prompt, against the rate of a large matrix product in the same run.

    python -m bench.prefill                  # 8K tokens of Llama-3-8B on a GPU; smaller on a CPU
    python -m bench.prefill --tokens 2K,8K

A prompt is one chunk: one step of the model, whose attention writes and reads a slot. Its
operations are 2 x parameters of the layers x tokens, 2 x the head for the one token that gets
logits, and those of causal attention, each pair of tokens counted once. The matrix rate is of a
product of two square matrices of random numbers, the best size of a few. The exit code is 1 if
something failed or --budget-s left no time for any prompt.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.common import (
    Budget,
    Json,
    Target,
    counts,
    print_table,
    wall_clock,
)
from bench.device import device_clock
from bench.model_args import (
    COMPILE_HELP,
    has_time,
    load_shape,
    model_parser,
    names,
    parse,
    release,
    settings_of,
    shape_of,
)
from bench.partial import Partial
from bench.shapes import DTYPES, Shape, Weights, count_weights
from bench.steps import Forwards, Mode, Slots, choose_modes, time_steps
from vattn.hf.compiled import CompiledModel
from vattn.hf.model import LoadedModel

DEFAULTS: dict[str, Json] = {
    "cuda": {
        "shape": "llama3-8b",
        "dtype": "bfloat16",
        "tokens": [8192],
        "matrices": [4096, 8192, 16384],
        "modes": ["eager", "compiled"],
    },
    "cpu": {
        "shape": "small-llama",
        "dtype": "float32",
        "tokens": [512],
        "matrices": [512, 1024],
        "modes": ["eager"],
    },
}
# No graphs: they are of decodes, and a chunk keeps the device busy while the next is launched.
PREFILL_MODES = ("eager", "compiled")


def matrix_rate(size: int, dtype: torch.dtype, device: str, rounds: int) -> float:
    """Operations per second of ``[size, size] @ [size, size]``, the median of some rounds."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    clock = wall_clock if device == "cpu" else device_clock
    times = [clock(lambda: torch.mm(a, b, out=out)) for _ in range(rounds + 3)]
    return 2 * size**3 / statistics.median(times[3:])


def matrix_rates(args: argparse.Namespace) -> Json:
    """The rate of each size."""
    dtype = DTYPES[args.dtype]
    with torch.inference_mode():
        return {
            str(size): matrix_rate(size, dtype, args.device, args.rounds) for size in args.matrices
        }


def operations(shape: Shape, weights: Weights, tokens: int) -> Json:
    """What the prefill of a prompt computes."""
    layers, head = 2 * weights.layers * tokens, 2 * weights.head
    attention = shape.attention_flops(tokens)
    return {
        "layer_flops": layers,
        "head_flops": head,
        "attention_flops": attention,
        "flops": layers + head + attention,
    }


def measure(
    args: argparse.Namespace,
    loaded: LoadedModel,
    mode: Mode,
    forward: CompiledModel | None,
    tokens: int,
    rate: float,
) -> Json:
    """One mode and prompt.

    Raises:
        AssertionError: logits that are not finite.
    """
    work = operations(shape_of(args), count_weights(loaded.model), tokens)
    with Slots(loaded, 1, tokens, args.backend) as slots:
        step = slots.prefill()
        runner = slots.runner(mode, forward)
        logits = runner.run(step)
        assert logits.shape == (1, loaded.vocab_size), logits.shape
        assert bool(logits.isfinite().all()), f"{mode.name}: logits are not finite"
        times = time_steps(
            lambda: runner.run(step), args.device, args.rounds, graphs=False, warmup=2
        )
        name = slots.backend.name
    done = work["flops"] / times.flow_us * 1e6
    return {
        "mode": mode.name,
        "backend": name,
        "tokens": tokens,
        **asdict(times),
        **work,
        "flops_per_s": done,
        "share": done / rate,
    }


def print_results(results: Json) -> None:
    print_table(
        "matrix product",
        ["size", "Tflop/s"],
        [[size, rate / 1e12] for size, rate in results["matrix_flops_per_s"].items()],
    )
    rows = [
        [
            *(r["mode"], r["tokens"], r["flow_us"] / 1e3),
            *(r[key] / 1e12 for key in ("flops", "attention_flops", "flops_per_s")),
            f"{r['share']:.1%}",
        ]
        for r in results.get("prefill", ())
    ]
    print_table(
        "prefill",
        [
            *("mode", "tokens", "flow ms"),
            *("Tflop", "of it attention", "Tflop/s", "of the matrix rate"),
        ],
        rows,
    )
    for mode, reason in results["refused_modes"].items():
        print(f"no {mode}: {reason}")
    if results["cut_for_time"]:
        print(f"cut: no time for {', '.join(results['cut_for_time'])}")


def make_targets(args: argparse.Namespace, results: Json) -> list[Target]:
    """Of the shape, device and length that the limit is for."""
    if (args.shape, args.device) != ("llama3-8b", "cuda") or 8192 not in args.tokens:
        return []
    shares = [r["share"] for r in results.get("prefill", ()) if r["tokens"] == 8192]
    share = max(shares, default=None)
    name = "prefill of 8K tokens, share of the matrix rate"
    return [Target(name, share, 0.6, "", at_least=True)]


def main(argv: Sequence[str] | None = None) -> int:
    cli = model_parser("bench.prefill", __doc__)
    cli.add_argument("--tokens", type=counts, help="of the prompts: 2K,8K")
    cli.add_argument("--matrices", type=counts, help="sizes of the matrix products")
    cli.add_argument("--modes", type=names(PREFILL_MODES), metavar="LIST")
    cli.add_argument("--compile-s", type=float, default=60.0, help=COMPILE_HELP)
    cli.add_argument("--rounds", type=int, default=10)
    args = parse(cli, argv, DEFAULTS)
    budget = Budget(args.budget_s)
    out = Partial(args.json, "prefill", settings_of(args), lambda found: make_targets(args, found))
    rates = matrix_rates(args)
    modes, refused = choose_modes(args.modes, args.device)
    out.set(matrix_flops_per_s=rates, refused_modes=refused)
    loaded = load_shape(args, max(args.tokens))
    forwards = Forwards(loaded)
    for mode in modes:
        for tokens in args.tokens:
            needed_s = forwards.needed_s(mode, args.compile_s)
            if has_time(budget, f"{mode.name} {tokens}", needed_s):
                with out.part(f"{mode.name} {tokens}"):
                    forward = forwards.of(mode)
                    row = measure(args, loaded, mode, forward, tokens, max(rates.values()))
                    out.append("prefill", row)
                release(args.device)
    out.set(compile_s=forwards.compile_s, cut_for_time=budget.cut, seconds=budget.spent_s)
    print_results(out.results)
    return out.end(rows=("prefill",))


if __name__ == "__main__":
    raise SystemExit(main())
