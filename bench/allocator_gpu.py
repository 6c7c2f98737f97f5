"""vattn's allocator against PyTorch's own on a GPU: time, memory, fragmentation, driver calls.

    python -m bench.allocator_gpu                # on a GPU
    python -m bench.allocator_gpu --device cpu   # tiny, without figures of memory: does it run?

Three ways, each in processes of its own that take turns: PyTorch's allocator as it is (native),
under expandable_segments:True (expandable), and vattn.allocator.enable() (vattn). Each process runs

training    AdamW steps of a Llama of 0.3 billion parameters in bf16, varying lengths, then one
fragments   blocks fill 12 GiB, every other one goes, larger ones come, and so on
pairs       torch.empty and the end of its tensor, from the cache
models      a program recorded by PyTorch's memory history and replayed through the models of its
            policies that bench.allocator has: their peaks against memory_stats

Peak memory is what the driver says is used, less what was before, over the bytes that tensors ask
for. A step is timed from an idle device to an idle device; ratios are of the same step of the same
round, median over all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.allocator_gpu_child import WAYS
from bench.allocator_gpu_models import find_or_build, modelled
from bench.common import Budget, Json, Target, parser, print_table, short_bytes
from bench.partial import Partial
from bench.provenance import ROOT, gpu_missing

OURS, TORCH = "vattn", ("native", "expandable")
_CONF = {"native": "expandable_segments:False", "expandable": "expandable_segments:True"}
# Of PyTorch's settings: the name of newer versions, and of all.
_CONF_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# A process has at least so long, whatever is left of the budget.
_LEAST_S = 60.0
_BUILD_S = 120.0


# Measuring ----------------------------------------------------------------------------------------


def run_way(way: str, device: str, traces: Path | None, limit_s: float) -> Json:
    """One process of a way.

    Raises:
        RuntimeError: it failed, or took longer; the message has the end of what it said.
    """
    told = {k: v for k, v in os.environ.items() if k not in (*_CONF_NAMES, "VATTN_BUDGET")}
    if way in _CONF:
        told |= dict.fromkeys(_CONF_NAMES, _CONF[way])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.allocator_gpu_child", "--way", way]
        command += ["--device", device, "--json", str(out)]
        command += [] if traces is None else ["--traces", str(traces)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{way} came to no end in {limit_s:.0f} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"{way} ended with {done.returncode}: {done.stderr.strip()[-1500:]}")
        found: Json = json.loads(out.read_text())
        return found


class Bench:
    """All rounds, and the models after the first.

    Args:
        args: of the command line.
        budget: what is begun.
        out: gets the rows.
        traces: a folder for recordings.
    """

    def __init__(
        self, args: argparse.Namespace, budget: Budget, out: Partial, traces: Path
    ) -> None:
        self._args = args
        self._budget = budget
        self._out = out
        self._traces = traces
        self._recorded: Json = {}

    def all(self) -> None:
        for number in range(self._args.rounds):
            if number == 0 or self._budget.allows(f"round {number + 1}"):
                self._round(number)
            if number == 0 and self._args.device == "cuda" and self._budget.allows("models"):
                with self._out.part("models"):
                    self._models()
        self._out.set(cut_for_time=self._budget.cut, seconds=self._budget.spent_s)

    def _round(self, number: int) -> None:
        """Each way once; who begins changes."""
        for i in range(len(WAYS)):
            way = WAYS[(i + number) % len(WAYS)]
            with self._out.part(f"round {number + 1} {way}"):
                found = run_way(
                    way, self._args.device, None if number else self._traces, self._limit_s()
                )
                self._take(number + 1, way, found)

    def _take(self, number: int, way: str, found: Json) -> None:
        begun = {"round": number, "way": way}
        self._out.append("training", begun | with_ratio(found["training"]))
        self._out.append("fragments", begun | with_ratio(found["fragments"]))
        for row in found["pairs"]:
            self._out.append("pairs", begun | row)
        if "recorded" in found:
            self._recorded[way] = found["recorded"]

    def _limit_s(self) -> float:
        if self._budget.seconds is None:
            return 600.0
        return max(_LEAST_S, self._budget.seconds - self._budget.spent_s)

    def _models(self) -> None:
        """What the replay makes of each recording, beside what was measured."""
        import torch

        device_bytes = torch.cuda.get_device_properties(0).total_memory >> 21 << 21
        replay = find_or_build(_BUILD_S)
        for policy in TORCH:
            path = self._traces / f"{policy}.npz"
            if policy in self._recorded:
                measured = self._recorded[policy]
                if "failed" in measured:
                    raise RuntimeError(f"the recording under {policy}: {measured['failed']}")
                self._out.append("models", modelled(replay, path, policy, device_bytes, measured))
        if OURS in self._recorded:
            self._out.set(recorded_program_under_vattn=self._recorded[OURS])


def with_ratio(row: Json) -> Json:
    """Adds ``ratio``: peak used / peak requested; None without figures."""
    requested = row.get("peak_requested_bytes")
    return row | {"ratio": row["peak_used_bytes"] / requested if requested else None}


# Targets ------------------------------------------------------------------------------------------


def step_ratio(rows: Sequence[Json], base: str, key: str = "step_us") -> float | None:
    """Ours / a base's, of the same step in the same round; the median."""
    by = {(row["round"], row["way"]): row for row in rows}
    ratios = [
        ours / theirs
        for (number, way), row in by.items()
        if way == OURS and (number, base) in by
        for ours, theirs in zip(row[key], by[number, base][key], strict=True)
    ]
    return statistics.median(ratios) if ratios else None


def worst(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def against_torch(rows: Sequence[Json]) -> float | None:
    """Our highest peak over the lowest of PyTorch's."""
    peaks: dict[str, list[int]] = {}
    for row in rows:
        if row["ratio"] is not None:
            peaks.setdefault(row["way"], []).append(row["peak_used_bytes"])
    theirs = [peak for way in TORCH for peak in peaks.get(way, ())]
    return max(peaks[OURS]) / min(theirs) if OURS in peaks and theirs else None


def make_targets(args: argparse.Namespace, results: Json) -> list[Target]:
    """Of the results so far; none on a CPU."""
    if args.device != "cuda":
        return []
    training, fragments = results.get("training", ()), results.get("fragments", ())
    ours = [row for row in training if row["way"] == OURS]
    figures = [
        *((f"training step / {base}'s", step_ratio(training, base), 1.02) for base in TORCH),
        ("GPU memory / requested, training", worst([row["ratio"] for row in ours]), 1.05),
        ("the same / PyTorch's lower one", against_torch(training), 1.0),
        ("GPU memory / PyTorch's lower one, fragments", against_torch(fragments), 1.0),
        ("driver calls, steps of one length", worst([r["steady_calls"] for r in ours]), 0.0),
        (
            "peaks of the models of PyTorch's policies, off by",
            worst([row["off_by"] for row in results.get("models", ())]),
            0.02,
        ),
    ]
    return [Target(name, value, limit, "", at_least=False) for name, value, limit in figures]


# Output -------------------------------------------------------------------------------------------


def print_results(results: Json) -> None:
    print_table(
        "training: ms of a step, peak of the GPU's memory, driver calls; of steps of one length",
        ["round", "way", "first", "again", "used", "requested", "ratio", "calls", "steady"],
        [
            [
                *(row["round"], row["way"]),
                *(f"{statistics.median(row[key]) / 1e3:.2f}" for key in ("first_us", "step_us")),
                *memory_cells(row),
                *(row.get("driver_calls"), row["steady_calls"]),
            ]
            for row in results.get("training", ())
        ],
    )
    print_table(
        "fragments",
        ["round", "way", "us/operation", "used", "requested", "ratio", "calls"],
        [
            [
                *(row["round"], row["way"], f"{row['us'] / row['operations']:.1f}"),
                *(*memory_cells(row), row.get("driver_calls")),
            ]
            for row in results.get("fragments", ())
        ],
    )
    print_table(
        "torch.empty and its end, ns",
        ["round", "way", "bytes", "median", "best"],
        [
            [row["round"], row["way"], short_bytes(row["bytes"]), row["ns"], row["low_ns"]]
            for row in results.get("pairs", ())
        ],
    )
    print_table(
        "models of PyTorch's policies: peaks",
        ["trace", "policy", "modelled", "measured", "off by"],
        [
            [
                *(row["trace"], row["policy"]),
                *(short_bytes(row[key]) for key in ("modelled_bytes", "measured_bytes")),
                f"{row['off_by']:.4f}",
            ]
            for row in results.get("models", ())
        ],
    )


def memory_cells(row: Json) -> list[object]:
    if row["ratio"] is None:
        return [None, None, None]
    used = [short_bytes(row[key]) for key in ("peak_used_bytes", "peak_requested_bytes")]
    return [*used, f"{row['ratio']:.3f}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cli = parser("bench.allocator_gpu", __doc__)
    cli.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    cli.add_argument("--rounds", type=int, default=3, help="processes of each way")
    cli.add_argument("--budget-s", type=float, help="seconds after which no round is begun")
    args = cli.parse_args(argv)
    if args.rounds < 1:
        cli.error(f"--rounds {args.rounds} must be at least 1")
    if args.device is None:
        args.device = "cpu" if gpu_missing() else "cuda"
    elif args.device == "cuda" and (reason := gpu_missing()):
        cli.error(f"--device cuda: {reason}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    out = Partial(args.json, "allocator_gpu", settings, lambda found: make_targets(args, found))
    with tempfile.TemporaryDirectory() as traces:
        Bench(args, Budget(args.budget_s), out, Path(traces)).all()
    print_results(out.results)
    return out.end(rows=("training", "fragments", "pairs"))


if __name__ == "__main__":
    raise SystemExit(main())
