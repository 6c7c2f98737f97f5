"""Decode steps of a compiled model against the same model as it is, their steps taking turns.

    python -m bench.compile                          # 8 layers of 512 on a CPU, Llama-3-8B on a GPU
    python -m bench.compile --points 1x256 --device cpu
    python -m bench.compile --tune                   # GPU: kernels searched for, which takes longer

A point is a number of sequences and the context of each. The model, the slots and the backend are
the same for both; above 1, the compiled model is faster. On a GPU a step is timed on the device, by
events around it, once launched kernel by kernel and once as a CUDA graph.

compile   seconds to make both graphs of a model, for one token and for any number of them; every
          process makes them anew, see vattn.hf.compiled
difference   of the logits, as a share of their spread

Each result is written as soon as it is there. --budget-s counts compiling too; the first point is
measured in any case. The exit code is 1 if something failed or nothing was measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict

from bench.common import Budget, Json, Target, measure_pairs, print_table, wall_clock
from bench.device import device_clock
from bench.model_args import (
    has_time,
    load_shape,
    model_parser,
    parse,
    points,
    release,
    settings_of,
)
from bench.partial import Partial
from bench.steps import Slots
from vattn.engine.runner import ModelRunner
from vattn.hf.compiled import CompiledModel, compile_model
from vattn.hf.model import LoadedModel

DEFAULTS: dict[str, Json] = {
    "cuda": {
        "shape": "llama3-8b",
        "dtype": "bfloat16",
        "points": [(1, 1024), (32, 1024)],
        "pairs": 30,
    },
    "cpu": {
        "shape": "llama-8x512",
        "dtype": "float32",
        "points": [(1, 256), (32, 256)],
        "pairs": 60,
    },
}


def compile_timed(loaded: LoadedModel, tune: bool) -> tuple[CompiledModel, Json]:
    """The compiled model, and what it took.

    Raises:
        RuntimeError: it does not compile, so there is nothing to measure.
    """
    start = time.perf_counter()
    compiled = compile_model(loaded, tune=tune)
    seconds = time.perf_counter() - start
    if compiled.refusal is not None:
        raise RuntimeError(f"the model does not compile: {compiled.refusal}")
    return compiled, {"seconds": seconds, "graphs": 2}


def make_runner(slots: Slots, compiled: CompiledModel | None, graphs: bool) -> ModelRunner:
    """A runner on the slots, its graph captured if it is to have one."""
    runner = ModelRunner(
        slots.loaded,
        slots.cache,
        slots.backend,
        max_num_seqs=len(slots.slots),
        max_model_len=slots.tokens,
        scratch_slot=slots.scratch,
        capture_sizes=[len(slots.slots)] if graphs else None,
        graphs=graphs,
        forward=compiled,
    )
    runner.capture()
    return runner


def compare(slots: Slots, compiled: CompiledModel, graphs: bool, pairs: int) -> Json:
    """One point, one way of launching: the steps of both, and how far their logits are apart.

    Raises:
        RuntimeError: a step was not captured, or one was not run compiled.
    """
    batch = slots.decode()
    plain, other = (make_runner(slots, forward, graphs) for forward in (None, compiled))
    wanted, got = plain.run(batch).clone(), other.run(batch).clone()
    found = measure_pairs(
        lambda: plain.run(batch),
        lambda: other.run(batch),
        pairs=pairs,
        warmup=5,
        clock=wall_clock if slots.loaded.device.type == "cpu" else device_clock,
    )
    if graphs and not (plain.graph_stats.replayed and other.graph_stats.replayed):
        raise RuntimeError("the decode step was not captured; see the log above")
    if compiled.refusal is not None:
        raise RuntimeError(f"the model was compiled again too often: {compiled.refusal}")
    difference = float((got - wanted).norm() / wanted.norm())
    return {
        "sequences": len(slots.slots),
        "context": slots.tokens,
        "launch": "graph" if graphs else "kernels",
        "difference": difference,
        **asdict(found),
    }


def run(args: argparse.Namespace, out: Partial, budget: Budget) -> None:
    """Compiles and measures; what comes of it goes to ``out`` as it comes."""
    loaded = load_shape(args, max(context for _, context in args.points) + 1)
    compiled, took = compile_timed(loaded, args.tune)
    out.set(compile=took)
    for sequences, context in args.points:
        name = f"{sequences}x{context}"
        # One at least: compiling is what takes the time, and alone it says nothing.
        if "steps" in out.results and not has_time(budget, name):
            continue
        with out.part(name), Slots(loaded, sequences, context, args.backend) as slots:
            captured = args.device == "cuda" and slots.backend.graphs
            for graphs in [False, True] if captured else [False]:
                out.append("steps", compare(slots, compiled, graphs, args.pairs))
        release(args.device)


def print_results(found: Json) -> None:
    if "compile" in found:
        print(f"\ncompiled in {found['compile']['seconds']:.1f} s")
    rows = [
        [
            f"{step['sequences']}x{step['context']}",
            step["launch"],
            step["base_us"],
            step["candidate_us"],
            step["ratio"],
            f"{step['ratio_low']:.2f}-{step['ratio_high']:.2f}",
            step["difference"],
        ]
        for step in found.get("steps", ())
    ]
    header = ["point", "launch", "plain us", "compiled us", "compiled is x", "quartiles"]
    print_table("decode steps", [*header, "difference"], rows)
    if found["cut_for_time"]:
        print(f"no time for {', '.join(found['cut_for_time'])}")


def make_targets(found: Json) -> list[Target]:
    """What makes it the default: it is faster at each point, as the engine would launch it."""
    best: dict[str, Json] = {}
    for step in found.get("steps", ()):
        best[f"{step['sequences']}x{step['context']}"] = step  # graphs come last
    return [
        Target(f"compiled over plain, {point}", step["ratio"], 1.0, "x", at_least=True)
        for point, step in best.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    cli = model_parser("bench.compile", __doc__)
    cli.add_argument("--points", type=points, help="sequences x context, such as 1x1K,32x1K")
    cli.add_argument("--pairs", type=int, help="of steps at each point")
    cli.add_argument("--tune", action="store_true", help="see vattn.hf.compiled; GPU only")
    args = parse(cli, argv, DEFAULTS)
    if args.tune and args.device != "cuda":
        cli.error("--tune: there is nothing to tune on a CPU")
    budget = Budget(args.budget_s)
    out = Partial(args.json, "compile", settings_of(args), make_targets)
    with out.part("compile"):
        run(args, out, budget)
    out.set(cut_for_time=budget.cut, seconds=budget.spent_s)
    print_results(out.results)
    return out.end(rows=("steps",))


if __name__ == "__main__":
    raise SystemExit(main())
