"""Decode steps of a real shape with random weights, against the time that their bytes take.

    python -m bench.decode                          # Llama-3-8B on a GPU, a small Llama on a CPU
    python -m bench.decode --points 1x1K,64x2K --modes eager,graphs,graphs+compiled

A point is a batch and the context of each of its sequences. The floor of a step is its bytes, all
weights but the embedding table and the K and V of every sequence, at the bandwidth at which this
run copies memory; a ratio is step / floor, 1 is the best there can be.

steps     the model alone: slots are filled by hand, and one step is launched after the other.
          Beside it, for graphs, the time on the device alone, when the launch is there before it
          is needed: what a flow takes beyond that is the host's. "difference": of the logits to
          those of the first mode, as a share of their spread
engine    whole steps of an engine in its steady state, all sequences decoding: scheduling, memory,
          model, sampling, output; from one return of step() to the next
append    the ways to write the new K and V that the attention backend can be asked for

Each result is written as soon as it is there, and what there is no time for (--budget-s) is listed.
The exit code is 1 if something failed or nothing was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from bench.common import Budget, Json, Target, print_table
from bench.decode_append import append_ways, appending
from bench.decode_engine import engine_steps, longest
from bench.device import copy_bandwidth
from bench.model_args import (
    COMPILE_HELP,
    has_time,
    load_shape,
    model_parser,
    names,
    parse,
    points,
    release,
    settings_of,
    shape_of,
)
from bench.partial import Partial
from bench.shapes import count_weights
from bench.steps import MODES, Forwards, Mode, Slots, StepTimes, choose_modes, time_steps
from vattn.attention.base import Backend
from vattn.engine.batch import StepBatch
from vattn.engine.runner import ModelRunner
from vattn.hf.model import LoadedModel

DEFAULTS: dict[str, Json] = {
    "cuda": {
        "shape": "llama3-8b",
        "dtype": "bfloat16",
        "points": [(1, 1024), (64, 2048)],
        "modes": ["eager", "graphs", "graphs+compiled"],
    },
    "cpu": {
        "shape": "small-llama",
        "dtype": "float32",
        "points": [(1, 256), (8, 512)],
        "modes": ["eager"],
    },
}
# The figures that are asked for: a point, its limit, and the modes of which the best counts.
LIMITS = (
    ((1, 1024), 1.35, ("graphs+compiled",)),
    ((64, 2048), 1.5, ("graphs", "graphs+compiled")),
)

Point = tuple[int, int]


class Decode:
    """Everything that one run measures, and where it goes."""

    def __init__(
        self, args: argparse.Namespace, loaded: LoadedModel, out: Partial, budget: Budget
    ) -> None:
        self.args = args
        self.loaded = loaded
        self.out = out
        self.budget = budget
        self.forwards = Forwards(loaded)
        self.token_bytes = shape_of(args).kv_token_bytes(loaded.dtype)
        self.weights = count_weights(loaded.model)
        with torch.inference_mode():
            self.bandwidth = copy_bandwidth(args.device)
        out.set(
            copy_bandwidth_bytes_per_s=self.bandwidth,
            weights=asdict(self.weights),
            kv_token_bytes=self.token_bytes,
        )

    def floor(self, batch: int, context: float) -> Json:
        """Bytes of a step of so many sequences of so many tokens, and how long a copy takes."""
        kv = int(batch * context * self.token_bytes)
        read = self.weights.read_bytes + kv
        return {
            "weight_bytes": self.weights.read_bytes,
            "kv_bytes": kv,
            "floor_us": read / self.bandwidth * 1e6,
        }

    def steps(self, mode: Mode, point: Point) -> None:
        """The model's step in a mode."""
        batch, context = point
        with Slots(self.loaded, batch, context, self.args.backend) as slots:
            step = slots.decode()
            runner = slots.runner(mode, self.forwards.of(mode))
            times = self._times(mode, runner, step)
            row = {
                "mode": mode.name,
                "backend": slots.backend.name,
                "batch": batch,
                "context": context,
                **asdict(times),
                **self.floor(batch, context),
                "difference": self._difference(slots, runner, step, mode),
            }
        self.out.append("steps", row | {"ratio": row["flow_us"] / row["floor_us"]})

    def _difference(
        self, slots: Slots, runner: ModelRunner, step: StepBatch, mode: Mode
    ) -> float | None:
        """How far the logits are from those of eager steps; None for eager itself.

        Raises:
            AssertionError: they are not finite.
        """
        logits = runner.run(step).float().clone()
        assert bool(logits.isfinite().all()), f"{mode.name}: logits are not finite"
        if mode.name == "eager":
            return None
        expected = slots.runner(MODES["eager"], None).run(step).float()
        return float((logits - expected).abs().max() / expected.std())

    def engine(self, mode: Mode, point: Point) -> None:
        """The engine's step in a mode."""
        forward = self.forwards.of(mode)
        steps, backend = self.args.engine_steps, self.args.backend
        found = engine_steps(self.loaded, mode, forward, point, steps, backend)
        floor = self.floor(point[0], found["context_mean"])
        row = {"mode": mode.name, "batch": point[0], "context": point[1], **found, **floor}
        same = self._step_of(mode, point)
        row["ratio"] = row["step_us"] / row["floor_us"]
        row["host_gap_us"] = None if same is None else row["step_us"] - same
        self.out.append("engine", row)

    def _step_of(self, mode: Mode, point: Point) -> float | None:
        """Microseconds on the device of the model's step, if it was measured."""
        key = "flow_us" if self.args.device == "cpu" else "device_us"
        for row in self.out.results.get("steps", ()):
            if (row["mode"], row["batch"], row["context"]) == (mode.name, *point):
                return None if row[key] is None else float(row[key])
        return None

    def appends(self, mode: Mode, point: Point) -> None:
        """The ways to append, each over slots of its own."""
        for way in append_ways(self.loaded, self.args.backend):
            with appending(way, self.loaded, self.args.backend) as backend:
                times = self._time(mode, point, backend)
            row = {"way": way, "mode": mode.name, "batch": point[0], "context": point[1]}
            self.out.append("append", row | {"backend": backend.name} | asdict(times))
            release(self.args.device)

    def _time(self, mode: Mode, point: Point, backend: Backend) -> StepTimes:
        with Slots(self.loaded, *point, backend) as slots:
            step = slots.decode()
            runner = slots.runner(mode, self.forwards.of(mode))
            return self._times(mode, runner, step)

    def _times(self, mode: Mode, runner: ModelRunner, step: StepBatch) -> StepTimes:
        device, rounds = self.args.device, self.args.rounds
        return time_steps(lambda: runner.run(step), device, rounds, graphs=mode.graphs)

    def all(self) -> None:
        """Everything there is time for, what matters most first."""
        modes, refused = choose_modes(self.args.modes, self.args.device)
        work: list[tuple[str, Mode, Callable[[], None]]] = []

        def plan(kind: str, do: Callable[[Mode, Point], None], wanted: Sequence[Mode]) -> None:
            for mode in wanted:
                for point in self.args.points:
                    name = f"{kind} {mode.name} {point[0]}x{point[1]}"
                    work.append((name, mode, lambda mode=mode, point=point: do(mode, point)))  # type: ignore[misc]

        plan("steps", self.steps, modes)
        if self.args.engine_steps:
            served = [m for m in modes if m.graphs or not m.compiled or self.args.device == "cpu"]
            plan("engine", self.engine, served[::-1])
        plan("append", self.appends, [mode for mode in modes if not mode.compiled][-1:])
        self.out.set(refused_modes=refused)
        for name, mode, do in work:
            if has_time(self.budget, name, self.forwards.needed_s(mode, self.args.compile_s)):
                print(f"{self.budget.spent_s:5.0f} s  {name}", flush=True)
                with self.out.part(name):
                    do()
                release(self.args.device)
        self.out.set(
            compile_s=self.forwards.compile_s,
            cut_for_time=self.budget.cut,
            seconds=self.budget.spent_s,
        )


# Output -------------------------------------------------------------------------------------------


def print_results(results: Json) -> None:
    steps = [
        [
            *(r[key] for key in ("mode", "batch", "context", "flow_us", "device_us", "floor_us")),
            f"{r['ratio']:.2f}",
            r["difference"],
        ]
        for r in results.get("steps", ())
    ]
    print_table(
        f"the model's step, us; floor at {results['copy_bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s",
        ["mode", "batch", "context", "flow", "device", "floor", "flow/floor", "difference"],
        steps,
    )
    engine = [
        [
            *(r[key] for key in ("mode", "batch", "context", "step_us", "p99_us", "floor_us")),
            f"{r['ratio']:.2f}",
            *(r[key] for key in ("host_gap_us", "tokens_per_s")),
        ]
        for r in results.get("engine", ())
    ]
    print_table(
        "the engine's step, us",
        ["mode", "batch", "context", "step", "p99", "floor", "step/floor", "host gap", "tokens/s"],
        engine,
    )
    keys = ("way", "mode", "batch", "context", "flow_us", "device_us")
    print_table(
        "the model's step by the way to append, us",
        ["way", "mode", "batch", "context", "flow", "device"],
        [[r[key] for key in keys] for r in results.get("append", ())],
    )
    for mode, reason in results["refused_modes"].items():
        print(f"no {mode}: {reason}")
    if results["cut_for_time"]:
        print(f"no time for: {', '.join(results['cut_for_time'])}")


def make_targets(args: argparse.Namespace, results: Json) -> list[Target]:
    """Of the shape, device and points that the limits are for."""
    if (args.shape, args.device) != ("llama3-8b", "cuda"):
        return []
    rows = results.get("steps", ())
    targets = []
    for (batch, context), limit, modes in LIMITS:
        if (batch, context) not in args.points:
            continue
        found = {
            r["mode"]: r["ratio"] for r in rows if (r["batch"], r["context"]) == (batch, context)
        }
        best = min(
            (mode for mode in modes if mode in found), key=lambda mode: found[mode], default=""
        )
        notes = [f"{mode} {ratio:.2f}" for mode, ratio in found.items() if mode != best]
        name = f"decode step over its floor, batch {batch}, context {context}"
        note = ", ".join([best, *notes]) if best else ""
        targets.append(Target(name, found.get(best), limit, "x", at_least=False, note=note))
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    cli = model_parser("bench.decode", __doc__)
    cli.add_argument("--points", type=points, metavar="LIST", help="batch x context: 1x1K,64x2K")
    cli.add_argument("--modes", type=names(list(MODES)), metavar="LIST")
    cli.add_argument("--compile-s", type=float, default=60.0, help=COMPILE_HELP)
    cli.add_argument("--rounds", type=int, default=30, help="steps of the model that are timed")
    cli.add_argument("--engine-steps", type=int, default=100, help="of the engine; 0 for none")
    args = parse(cli, argv, DEFAULTS)
    budget = Budget(args.budget_s)
    out = Partial(args.json, "decode", settings_of(args), lambda found: make_targets(args, found))
    longest_context = max(context for _, context in args.points)
    loaded = load_shape(args, longest(longest_context, args.engine_steps))
    Decode(args, loaded, out, budget).all()
    print_results(out.results)
    return out.end(rows=("steps", "engine", "append"))


if __name__ == "__main__":
    raise SystemExit(main())
