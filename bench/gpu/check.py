"""Everything that a GPU can show, in stages, in less than nine minutes: ``make gpu-check``.

    python -m bench.gpu.check                  # all stages
    python -m bench.gpu.check --only layout    # one of them (repeatable)
    python -m bench.gpu.check --rehearse       # on a CPU, at tiny settings: no figures

Each stage has a time limit and writes ``DIR/<stage>.json`` as soon as it ends, so a run that is cut
short, by a signal too, leaves what it finished. Without a GPU every stage is listed as skipped, and
that is no error. It needs no network. ``python -m bench.report --collect DIR`` takes results over.

build      pip install -e . if the native module is missing or older than its sources
contract   the driver contract on the real driver, and cuda-python's opinion of the same addresses
cache      the tests of KVCache and its pool on the real driver
attention  every installed attention backend against a float32 reference
engine     vattn.LLM against generate, float32 exact and bf16 close
graphs     captured CUDA graphs replayed while pages change beneath them
decode     bench.decode: a decode step against what reading weights and K/V takes
layout     bench.layout: attention on virtual slots for every layout and page size
workload   bench.workload: tokens per second, TTFT, TPOT, and transformers' generate_batch
mapping    bench.mapping: what mapping adds to the steps of a conversation trace
prefill    bench.prefill: against the measured bf16 matrix rate
memcheck   bench.gpu.memcheck: a short engine run under compute-sanitizer
vmm        bench.vmm: every driver operation, batched and one by one, beside a running kernel
compile    bench.compile: torch.compile around the attention call, on and off
jitter     bench.jitter: what mapping beside a decode step does to its length
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The native module may not exist before the stage "build": nothing of vattn or of what imports it
# can be imported here.
from bench.gpu.child import Cut, run
from bench.gpu.stages import REHEARSAL_S, STAGES, TOTAL_S, Stage, limit_of
from bench.provenance import ROOT, device_slug, git_commit, gpu_missing, machine, versions

_LEAST_S = 12.0  # a stage with less is not begun
_LOG_CHARS = 20_000  # kept of a stage's output
_SHOWN_CHARS = {"passed": 1500, "failed": 3000, "timeout": 3000, "cut": 1000, "skipped": 500}


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "passed", "failed", "timeout", "cut" by a signal, or "skipped"."""

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
        if limit_s < _LEAST_S:
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
        beside.write_text(json.dumps(document, indent=1, default=str) + "\n")
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
    ended = run([sys.executable, *words], limit_s, environment(stage, rehearse), cut)
    status = "passed" if ended.code == 0 else "failed"
    status = "cut" if ended.cut else "timeout" if ended.at_limit else status
    found = read_results(results)
    notes = [f"exit code {ended.code}"] if status == "failed" else []
    counted = count_tests(ended.log)
    if stage.tests and status == "passed" and " passed" not in counted and not rehearse:
        status = "failed"  # each one was skipped, and so nothing was shown
        notes = ["no test passed"]
    notes += [counted] if stage.tests else []
    notes += describe_targets(found)
    if "{json}" in stage.command and status == "passed" and found is None and not rehearse:
        # It says why it measured nothing, or it is wrong.
        last = (ended.log.strip().splitlines() or [""])[-1]
        skipped = last.startswith("skipped: ")
        status = "skipped" if skipped else "failed"
        notes = [last.removeprefix("skipped: ") if skipped else "it wrote no result"]
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
    if stage.tests and rehearse:
        found["VATTN_GPU_TESTS_DEVICE"] = "cpu"
    if stage.name == "build":
        # --no-deps changes nothing but vattn itself, also in an interpreter of the distribution.
        found |= {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return found


def native_module_problem() -> str | None:
    """Why the native module has to be built; None if it is there and newer than its sources."""
    try:
        spec = importlib.util.find_spec("vattn._core")
    except ImportError as error:
        return f"vattn cannot be imported: {error}"
    if spec is None or spec.origin is None:
        return "vattn._core is not built"
    built = Path(spec.origin).stat().st_mtime
    sources = [
        ROOT / "CMakeLists.txt",
        *(ROOT / "csrc").glob("*.cpp"),
        *(ROOT / "csrc").glob("*.h"),
    ]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > built:
        return f"{newest.relative_to(ROOT)} is newer than vattn._core"
    return None


def find_backends(cut: Cut) -> dict[str, str | None] | None:
    """Each attention backend and why it cannot be used, None for those that can."""
    ended = run([sys.executable, "-m", "bench.gpu.found"], 60, {}, cut)
    if ended.code != 0:
        print(ended.log[-_SHOWN_CHARS["failed"] :], flush=True)
        return None
    found: dict[str, str | None] = json.loads(ended.log.splitlines()[-1])
    return found


def read_results(path: Path) -> Any:
    """What a benchmark wrote, also one that was ended before it was done; None for nothing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def count_tests(log: str) -> str:
    """Of ``pytest -v``, also of a run that was cut short."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)", log, re.MULTILINE)
    counted = {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return ", ".join(f"{n} {word.lower()}" for word, n in counted.items() if n) or "no test ran"


def targets_of(results: Any) -> list[Mapping[str, Any]]:
    return list(results.get("targets") or ()) if isinstance(results, Mapping) else []


def describe_targets(results: Any) -> list[str]:
    """How many were met, of those that were measured."""
    measured = [target for target in targets_of(results) if target["met"] is not None]
    if not measured:
        return []
    met = sum(target["met"] for target in measured)
    return [f"{met} of {len(measured)} targets met"]


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The figures that have a target, then one line per stage."""
    print()
    for outcome in outcomes:
        for target in targets_of(outcome.results):
            measured = target["measured"]
            value = "-" if measured is None else f"{measured:.4g}"
            sign = ">=" if target["at_least"] else "<="
            verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
            limit = f"{sign} {target['limit']:g} {target['unit']}".rstrip()
            print(f"{outcome.stage:<10}{target['name']}: {value} ({limit}, {verdict})")
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
    cli.add_argument("--only", action="append", choices=names, metavar="STAGE", help="repeatable")
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
    stages = [stage for stage in STAGES if not args.only or stage.name in args.only]
    reason = None if args.rehearse else gpu_missing()
    if reason is not None:
        outcomes = [Outcome(stage.name, "skipped", reason) for stage in stages]
        if args.out is not None:
            for outcome in outcomes:
                Run(args.out).write(outcome)
        print_outcomes(outcomes)
        return 0
    slug = "rehearsal" if args.rehearse else device_slug("cuda")
    out = args.out or ROOT / "results" / slug
    made = Run(out, args.rehearse, args.total_s)
    outcomes = made.all(stages)
    print_outcomes(outcomes)
    print(f"results in {out}{': a rehearsal, no measurement' if args.rehearse else ''}")
    if made.ended_by is not None:
        return 128 + made.ended_by
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
