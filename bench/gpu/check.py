"""What a GPU can show, in stages, in less than nine minutes: ``make gpu-check``.

    python -m bench.gpu.check                      # all stages but those marked *
    python -m bench.gpu.check --group correctness  # all other tests, memcheck, jitter
    python -m bench.gpu.check --group sampling     # decoding parameters, beams, speculation
    python -m bench.gpu.check --group decode       # decode, prefill, allocator-bench
    python -m bench.gpu.check --group serving      # layout, workload, mapping, vmm, ...
    python -m bench.gpu.check --group levels       # against paged memory: kernels, memory, offline
    python -m bench.gpu.check --group levels-served  # and: serving, ablations, peers
    python -m bench.gpu.check --group papers       # the experiments of the vAttention paper
    python -m bench.gpu.check --only compile       # one stage (repeatable)
    python -m bench.gpu.check --rehearse           # on a CPU, at tiny settings: no figures

One run has no time for everything: in the groups, nine minutes each, a stage shares the time
with few others; they leave out "compile" and "level-allocator", which are asked for by --only.

Each stage has a time limit and writes ``DIR/<stage>.json`` as soon as it ends, so a run that is cut
short, by a signal too, leaves what it finished. Without a GPU every stage is listed as skipped, and
that is no error. It needs no network. ``python -m bench.report --collect DIR`` takes results over.

build      pip install -e . if the native module is missing or of other sources
contract   the driver contract on the real driver, and cuda-python's opinion of the same addresses
cache      the tests of KVCache and its pool on the real driver
attention  every installed attention backend against a float32 reference
engine     vattn.LLM against generate, float32 exact and bf16 close; memcheck's run by itself
graphs     captured CUDA graphs replayed while pages change beneath them
sampling * decoding parameters, structured outputs, beams and speculation; nothing waits for the GPU
allocator* PyTorch's memory from vattn: training, graphs, streams, pause, out of memory, an engine
decode     bench.decode: a decode step against what reading weights and K/V takes
layout     bench.layout: attention on virtual slots for every layout and page size
workload   bench.workload: tokens per second, TTFT, TPOT, and transformers' generate_batch
mapping  * bench.mapping: what mapping adds to the steps of a conversation trace
prefill  * bench.prefill: against the measured bf16 matrix rate
memcheck * bench.gpu.memcheck: a short engine run under compute-sanitizer
vmm      * bench.vmm: every driver operation, batched and one by one, beside a running kernel
compile  * bench.compile: torch.compile around the attention call, on and off
jitter   * bench.jitter: what mapping beside a decode step does to its length
allocator-bench* bench.allocator_gpu: training steps and fragmentation, against PyTorch's allocators
allocator-memcheck* bench.gpu.memcheck_allocator: a short program under compute-sanitizer
level-kernels* bench kernels: attention on contiguous and on paged K and V, kernel by kernel
level-kernels-paper-prefill* the same as in the paper's prefill experiment
level-kernels-paper-decode* and in its decode experiment
level-memory* bench memory: waste, batch sizes, driver calls, block tables
level-memory-paper-allocation* rate and latency of allocation
level-memory-paper-fragmentation* most requests in a batch by page size
level-offline* bench offline: requests per minute, contiguous and paged
level-offline-paper-offline* long contexts in batches
level-serving* bench serving: arrivals in time, latencies, goodput
level-allocator* bench allocator: PyTorch's memory
level-ablations* bench ablations: what each choice of ours is worth
level-peers* bench peers: transformers, vLLM, nano-vllm where they are installed
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The native module may not exist before the stage "build": nothing of vattn or of what imports it
# can be imported here.
from bench.gpu.child import LEAST_S, Cut, run, run_tests
from bench.gpu.native import native_module_problem
from bench.gpu.stages import GROUPS, REHEARSAL_S, STAGES, TOTAL_S, Stage, asked_for, limit_of
from bench.gpu.written import judge, read_results, targets_of
from bench.provenance import ROOT, device_slug, git_commit, gpu_missing, machine, versions
from bench.result_text import as_text

_LOG_CHARS = 20_000  # kept of a stage's output
_SHOWN_CHARS = {
    "passed": 1500,
    "partial": 3000,
    "failed": 3000,
    "timeout": 3000,
    "cut": 1000,
    "skipped": 500,
}


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    "passed", "partial" (a part of a benchmark failed, others were measured), "failed", "timeout",
    "cut" by a signal, or "skipped".
    """

    stage: str
    status: str
    note: str
    seconds: float = 0.0
    limit_s: float = 0.0
    command: tuple[str, ...] = ()
    log: str = ""
    results: Any = None


@dataclass
class Run:
    """One run of gpu-check: where results go and what all their files say."""

    out: Path
    rehearse: bool = False
    total_s: float = TOTAL_S
    outcomes: list[Outcome] = field(default_factory=list)
    backends: dict[str, str | None] | None = None
    ended_by: int | None = None  # the signal

    def all(self, stages: Sequence[Stage]) -> list[Outcome]:
        """Runs the stages; each one's file is written before the next one begins."""
        end = time.monotonic() + self.total_s
        with Cut() as cut:
            for i, stage in enumerate(stages):
                left = end - time.monotonic()
                limit = limit_of(stage, stages[i + 1 :], left)
                limit = REHEARSAL_S if self.rehearse else limit
                outcome = self._one(stage, limit, cut)
                self.outcomes.append(outcome)
                self.write(outcome)
                if outcome.log:
                    print(outcome.log[-_SHOWN_CHARS[outcome.status] :], flush=True)
                if stage.name == "build" and outcome.status == "passed":
                    self.backends = find_backends(cut)
        self.ended_by = cut.signal
        return self.outcomes

    def _one(self, stage: Stage, limit_s: float, cut: Cut) -> Outcome:
        built = next((o for o in self.outcomes if o.stage == "build"), None)
        if cut.signal is not None:
            return Outcome(stage.name, "skipped", f"the run was ended by signal {cut.signal}")
        if built is not None and built.status != "passed":
            return Outcome(stage.name, "skipped", "there is no native module: see the stage build")
        if limit_s < LEAST_S:
            return Outcome(stage.name, "skipped", f"no time left of {self.total_s:.0f} s")
        print(f"== {stage.name}: up to {limit_s:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            return run_stage(stage, limit_s, Path(folder) / "results.json", self.rehearse, cut)

    def write(self, outcome: Outcome) -> None:
        """Writes a stage's file as a whole: who ends the run finds no half of it.

        A stage that was skipped leaves alone what an earlier run found.
        """
        path = self.out / f"{outcome.stage}.json"
        if outcome.status == "skipped" and path.exists():
            return
        document = {
            "stage": outcome.stage,
            "status": outcome.status,
            "note": outcome.note,
            "seconds": outcome.seconds,
            "limit_s": outcome.limit_s,
            "command": list(outcome.command),
            "rehearsal": self.rehearse,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "commit": git_commit(),
            "machine": machine(),
            "attention_backends": self.backends,
            "log": outcome.log,
            "results": outcome.results,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        beside = self.out / f".{outcome.stage}.json.part"
        beside.write_text(as_text(document))
        beside.replace(path)


def run_stage(stage: Stage, limit_s: float, results: Path, rehearse: bool, cut: Cut) -> Outcome:
    """Runs a stage for at most ``limit_s`` seconds; what it printed and measured is kept."""
    if stage.name == "build":
        problem = native_module_problem()
        if problem is None:
            return Outcome(stage.name, "passed", "vattn._core is up to date", limit_s=limit_s)
        print(problem, flush=True)
    try:
        words = stage.words(str(results), limit_s, rehearse=rehearse)
    except FileNotFoundError as error:
        return Outcome(stage.name, "failed", str(error), limit_s=limit_s)
    command, told = [sys.executable, *words], environment(stage, rehearse)
    if stage.tests:
        ended = run_tests(command, limit_s, told, results.with_name("begun"), cut)
    else:
        ended = run(command, limit_s, told, cut)
    if stage.name == "build" and ended.code == 0:
        # In a process of its own: this one may not find what was installed after it began.
        run([sys.executable, "-m", "bench.gpu.native"], 30, {}, cut)
    found = read_results(results)
    status, notes = judge(stage, ended, found, rehearse)
    return Outcome(
        stage.name,
        status,
        ", ".join(notes),
        ended.seconds,
        limit_s,
        ("python", *(word if word != str(results) else "FILE" for word in words)),
        ended.log[-_LOG_CHARS:],
        found,
    )


def environment(stage: Stage, rehearse: bool) -> Mapping[str, str]:
    found = {"HF_HUB_OFFLINE": "1"}  # asking for a network that is not there takes its time
    if stage.tests:
        # For the plugin, wherever the tests are.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    if stage.tests and rehearse:
        found["VATTN_GPU_TESTS_DEVICE"] = "cpu"
    if stage.name == "build":
        # --no-deps changes nothing but vattn itself, also in an interpreter of the distribution.
        found |= {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return found


def find_backends(cut: Cut) -> dict[str, str | None] | None:
    """Each attention backend and why it cannot be used, None for those that can."""
    ended = run([sys.executable, "-m", "bench.gpu.found"], 60, {}, cut)
    if ended.code != 0:
        print(ended.log[-_SHOWN_CHARS["failed"] :], flush=True)
        return None
    found: dict[str, str | None] = json.loads(ended.log.splitlines()[-1])
    return found


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The figures that have a target, then one line per stage."""
    print()
    for outcome in outcomes:
        for target in targets_of(outcome.results):
            figure = target["measured"]
            value = "-" if figure is None else f"{figure:.4g}"
            sign = ">=" if target["at_least"] else "<="
            verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
            limit = f"{sign} {target['limit']:g} {target['unit']}".rstrip()
            print(f"{outcome.stage:<9} {target['name']}: {value} ({limit}, {verdict})")
    print()
    width = max(len(outcome.stage) for outcome in outcomes)
    for o in outcomes:
        print(f"{o.stage:<{width}}  {o.status:<7}  {o.seconds:6.1f} s  {o.note}".rstrip())
    sys.stdout.flush()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    which = cli.add_mutually_exclusive_group()
    which.add_argument("--only", action="append", choices=names, metavar="STAGE", help="repeatable")
    which.add_argument("--group", choices=list(GROUPS), help="the stages of one of three runs")
    cli.add_argument("--out", type=Path, metavar="DIR", help="default: results/<gpu>")
    cli.add_argument("--total-s", type=float, default=TOTAL_S, help="time for all stages")
    cli.add_argument(
        "--rehearse",
        action="store_true",
        help="every stage on the CPU at tiny settings, into results/rehearsal",
    )
    return cli.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    git_commit()  # a VATTN_COMMIT that is wrong is refused before minutes of work, not after
    names = args.only or GROUPS.get(args.group, ())
    stages = asked_for(names)
    if args.rehearse and not names:
        stages = list(STAGES)  # does each of them start?
    others = [] if names else [stage for stage in STAGES if stage not in stages]
    not_asked = [Outcome(s.name, "skipped", f"not asked for: --only {s.name}") for s in others]
    reason = None if args.rehearse else gpu_missing()
    if reason is not None:
        outcomes = [Outcome(stage.name, "skipped", reason) for stage in stages]
        if args.out is not None:
            for outcome in outcomes:
                Run(args.out).write(outcome)
        print_outcomes([*outcomes, *not_asked])
        return 0
    slug = "rehearsal" if args.rehearse else device_slug("cuda")
    out = args.out or ROOT / "results" / slug
    made = Run(out, args.rehearse, args.total_s)
    outcomes = made.all(stages)
    print_outcomes([*outcomes, *not_asked])
    print(f"results in {out}{': a rehearsal, no measurement' if args.rehearse else ''}")
    if made.ended_by is not None:
        return 128 + made.ended_by
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
