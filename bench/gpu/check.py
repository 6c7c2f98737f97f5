"""Everything that a GPU can show, in stages, in less than ten minutes: ``make gpu-check``.

    python -m bench.gpu.check                  # all stages
    python -m bench.gpu.check --only layout    # one of them (repeatable)

Each stage has a time limit and writes ``DIR/<stage>.json`` as soon as it ends, so a run that is cut
short leaves what it finished. Without a GPU every stage is listed as skipped, and that is no error.

build     pip install -e . if the native module is missing or older than its sources
contract  the driver contract suite on the real driver
cache     the tests of KVCache on the real driver
attention every installed attention backend against a float32 reference
engine    vattn.LLM against generate, float32 exact and bf16 close
vmm       bench.vmm: every driver operation, batched against one by one, beside a running kernel
layout    bench.layout: attention on virtual slots for every layout and page size
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The native module may not exist before the stage "build": nothing of vattn or of what imports it
# can be imported here.
from bench.provenance import ROOT, device_slug, git_commit, gpu_missing, machine, versions

TOTAL_S = 530.0
# Kept free for the layouts, which decide most.
LAYOUT_S = 150.0
_TAIL_CHARS = 20_000


@dataclass(frozen=True)
class Stage:
    name: str
    limit_s: float
    command: tuple[str, ...]  # "{json}" is where it writes results, "{limit}" its seconds

    @property
    def is_tests(self) -> bool:
        return "pytest" in self.command


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    status: str  # "passed", "failed", "timeout", "skipped"
    note: str
    seconds: float = 0.0
    log: str = ""
    results: Any = None


PYTEST = (
    "-m",
    "pytest",
    "-v",
    "-m",
    "gpu",
    "-W",
    "default",
    "--durations=5",
    "-p",
    "no:cacheprovider",
)
CONTRACT = ("tests/test_driver_contract.py", "tests/test_driver_contract_work.py")
CACHE = ("tests/gpu/test_cache_gpu.py", "tests/test_kv_cache.py", "tests/test_kv_memory.py")

STAGES = (
    Stage(
        "build",
        180,
        ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."),
    ),
    Stage("contract", 90, (*PYTEST, *CONTRACT)),
    Stage("cache", 120, (*PYTEST, *CACHE)),
    Stage("attention", 90, (*PYTEST, "tests/gpu/test_attention.py")),
    Stage("engine", 90, (*PYTEST, "tests/gpu/test_engine.py")),
    Stage("vmm", 90, ("-m", "bench.vmm", "--json", "{json}")),
    Stage("layout", 200, ("-m", "bench.layout", "--json", "{json}", "--budget-s", "{limit}")),
)


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


def run_stage(stage: Stage, limit_s: float, results: Path) -> Outcome:
    """Runs a stage for at most ``limit_s`` seconds; what it printed is kept in any case."""
    if stage.name == "build":
        problem = native_module_problem()
        if problem is None:
            return Outcome(stage.name, "passed", "vattn._core is up to date")
        print(problem)
    # The grid has to end before the limit does, with time for what surrounds it.
    replace = {"{json}": str(results), "{limit}": str(max(10.0, limit_s - 35))}
    command = [sys.executable, *(replace.get(word, word) for word in stage.command)]
    missing = [word for word in command if word.startswith("tests/") and not (ROOT / word).exists()]
    command = [word for word in command if word not in missing]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        log = out.read()
    seconds = time.monotonic() - start
    status = "timeout" if code is None else "passed" if code == 0 else "failed"
    notes = [f"exit code {code}"] if code else []
    notes += [f"no {path}" for path in missing]
    if stage.is_tests:
        notes.append(count_tests(log))
    found = json.loads(results.read_text()) if results.exists() else None
    return Outcome(stage.name, status, ", ".join(notes), seconds, log[-_TAIL_CHARS:], found)


def count_tests(log: str) -> str:
    """Of ``pytest -v``, also of a run that was cut short."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)", log, re.MULTILINE)
    counted = {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return ", ".join(f"{n} {word.lower()}" for word, n in counted.items() if n) or "no test ran"


def run_all(stages: Sequence[Stage], out: Path, total_s: float) -> list[Outcome]:
    end = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    for stage in stages:
        left = end - time.monotonic()
        if stage.name != "layout" and any(later.name == "layout" for later in stages):
            left -= LAYOUT_S
        blocked = next((o for o in outcomes if o.stage == "build" and o.status != "passed"), None)
        if blocked is not None:
            outcome = Outcome(stage.name, "skipped", "the build failed")
        elif left < 15:
            outcome = Outcome(stage.name, "skipped", f"no time left of {total_s:.0f} s")
        else:
            limit = min(stage.limit_s, left)
            print(f"{stage.name}: up to {limit:.0f} s", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                outcome = run_stage(stage, limit, Path(folder) / "results.json")
        outcomes.append(outcome)
        write_outcome(outcome, out)
        if outcome.status in ("failed", "timeout"):
            print(outcome.log[-3000:])
    return outcomes


def write_outcome(outcome: Outcome, out: Path) -> None:
    document = {
        "stage": outcome.stage,
        "status": outcome.status,
        "note": outcome.note,
        "seconds": outcome.seconds,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "commit": git_commit(),
        "machine": machine(),
        "log": outcome.log,
        "results": outcome.results,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{outcome.stage}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    width = max(len(outcome.stage) for outcome in outcomes)
    print()
    for o in outcomes:
        print(f"{o.stage:<{width}}  {o.status:<7}  {o.seconds:6.1f} s  {o.note}")
    sys.stdout.flush()


def print_logs(outcomes: Sequence[Outcome]) -> None:
    """The tables of the benchmarks, the layouts last: they decide."""
    for outcome in outcomes:
        if outcome.results is not None and outcome.status == "passed":
            print(f"\n== {outcome.stage}\n{outcome.log[-12_000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    cli.add_argument("--only", action="append", choices=names, metavar="STAGE", help="repeatable")
    cli.add_argument("--out", type=Path, metavar="DIR", help="default: results/<gpu>")
    cli.add_argument("--total-s", type=float, default=TOTAL_S, help="time for all stages")
    args = cli.parse_args(argv)
    stages = [stage for stage in STAGES if not args.only or stage.name in args.only]
    reason = gpu_missing()
    if reason is not None:
        outcomes = [Outcome(stage.name, "skipped", reason) for stage in stages]
        if args.out is not None:
            for outcome in outcomes:
                write_outcome(outcome, args.out)
        print_outcomes(outcomes)
        return 0
    out = args.out or ROOT / "results" / device_slug("cuda")
    outcomes = run_all(stages, out, args.total_s)
    print_logs(outcomes)
    print_outcomes(outcomes)
    print(f"results in {out}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
