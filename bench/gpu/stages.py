"""The stages of gpu-check: what each runs, on a GPU and in a rehearsal, and the time it has.

Standard library only: the native module does not exist before the first stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.provenance import ROOT

# All stages together; nine minutes are 540 s, and starting, asking for versions and writing files
# takes some.
TOTAL_S = 530.0
# Between the end of what a stage runs by itself and its limit: imports, and being ended.
_SPARE_S = 20.0
# Of a rehearsed stage, on machines that do other things beside it; benchmarks measure for 20 s.
REHEARSAL_S = 300.0
_REHEARSED_S = 20.0


@dataclass(frozen=True)
class Stage:
    """One step of gpu-check.

    Attributes:
        name: also of its result file.
        least_s: kept free for it while earlier stages run.
        most_s: it gets no more, unless it is the last.
        tests: files for pytest as patterns below the root, each of which has to match.
        command: of a stage without tests, for the interpreter; see :meth:`words`.
        gpu: added to ``command`` on a GPU.
        rehearsal: added to ``command`` in a rehearsal, or to pytest's arguments.
        rows: what of a benchmark's results holds measurements; if all are empty, it has none.
        alone: not in a run of all stages, which has no time for it; only when asked for.
    """

    name: str
    least_s: float
    most_s: float
    tests: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    alone: bool = False

    def words(self, json: str, limit_s: float, *, rehearse: bool = False) -> list[str]:
        """What follows the interpreter's name.

        Args:
            json: where it writes results, for ``{json}``.
            limit_s: seconds it has; ``{budget}`` is what is left of them for measuring, and
                ``{limit}`` for a command that it runs and has to end.
            rehearse: on a CPU, at a tiny setting.

        Raises:
            FileNotFoundError: a pattern matches no file.
        """
        if self.tests:
            return [*PYTEST, *(self.rehearsal if rehearse else ("-m", "gpu")), *self._files()]
        # Imports come before what a benchmark counts as its budget, what it has begun after it.
        budget_s = max(5.0, limit_s - max(_SPARE_S, 0.3 * limit_s))
        budget_s = _REHEARSED_S if rehearse else budget_s
        ends_s = max(5.0, limit_s - _SPARE_S)
        replace = {"{json}": json, "{budget}": f"{budget_s:.0f}", "{limit}": f"{ends_s:.0f}"}
        words = (*self.command, *(self.rehearsal if rehearse else self.gpu))
        return [replace.get(word, word) for word in words]

    def _files(self) -> list[str]:
        files = []
        for pattern in self.tests:
            found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
            if not found:
                raise FileNotFoundError(f"no file is {pattern}")
            files += found
        return files


PYTEST = (
    *("-m", "pytest", "-v", "-W", "default", "--durations=5"),
    *("-p", "no:cacheprovider", "-p", "bench.gpu.rest", "-o", "faulthandler_timeout=60"),
)
PIP = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")


def _bench(module: str, *words: str) -> tuple[str, ...]:
    return ("-m", module, *words, "--json", "{json}")


def _timed(module: str) -> tuple[str, ...]:
    return _bench(module, "--budget-s", "{budget}")


# Seconds to build a model and run it a little, on a CPU.
_TINY = ("--device", "cpu", "--shape", "tiny-llama")


def _level(name: str, least_s: float, most_s: float, rows: tuple[str, ...], *preset: str) -> Stage:
    """A level of the comparison with paged memory, or one of its presets."""
    words = ("--preset", *preset) if preset else ()
    return Stage(
        "-".join(("level", name, *preset)),
        least_s,
        most_s,
        command=("-m", "bench", name, *words, "--budget-s", "{budget}", "--json", "{json}"),
        rehearsal=("--device", "cpu", "--small"),
        rows=rows,
        alone=True,
    )


_MEMORY = ("waste", "batch", "calls", "rate", "tables", "latency")

# Correctness first, then what decides most. A stage may use what earlier ones left over. The least
# times of those that are not "alone" leave over a minute of TOTAL_S for what takes longer.
STAGES = (
    Stage("build", 45, 180, command=PIP),
    Stage(
        "contract",
        *(20, 60),
        tests=("tests/test_driver_contract*.py", "tests/gpu/test_second_opinion*.py"),
    ),
    Stage(
        "cache",
        *(30, 90),
        tests=(
            *(
                "tests/gpu/test_cache_gpu*.py",
                "tests/gpu/test_memory*.py",
                "tests/test_kv_cache.py",
            ),
            "tests/test_kv_memory.py",
            *("tests/test_kv_pool.py", "tests/test_kept_*.py", "tests/test_swap_copy.py"),
            *("tests/test_reserve.py", "tests/test_reserve_pool.py"),
        ),
    ),
    Stage("attention", 45, 90, tests=("tests/gpu/test_attention*.py",)),
    Stage(
        "engine",
        *(35, 120),
        tests=("tests/gpu/test_engine*.py", "tests/gpu/test_memcheck*.py"),
    ),
    Stage("graphs", 45, 120, tests=("tests/gpu/test_graphs*.py",)),
    Stage(
        "sampling",
        *(90, 240),
        tests=(
            *("tests/gpu/test_decoding*.py", "tests/gpu/test_beam_search*.py"),
            "tests/gpu/test_speculation*.py",
        ),
        alone=True,
    ),
    # Each of its tests is a process of its own, which imports torch and starts CUDA.
    Stage("allocator", *(120, 240), tests=("tests/gpu/test_allocator*.py",), alone=True),
    Stage(
        "decode",
        *(120, 240),
        command=_timed("bench.decode"),
        rehearsal=(*_TINY, "--points", "2x64", "--rounds", "2", "--engine-steps", "3"),
        rows=("steps", "engine", "append"),
    ),
    Stage(
        "layout",
        *(70, 150),
        command=_timed("bench.layout"),
        rehearsal=("--small",),
        rows=("cells",),
    ),
    Stage(
        "workload",
        *(55, 150),
        command=_timed("bench.workload"),
        rehearsal=(
            *(*_TINY, "--nano-shape", "tiny-qwen3", "--requests", "4", "--lengths", "4,8"),
            *("--concurrency", "1,2", "--sequences", "4", "--versus-s", "5"),
        ),
        rows=("nano", "served", "versus"),
    ),
    Stage(
        "mapping",
        *(50, 90),
        command=_timed("bench.mapping"),
        rehearsal=(
            *(*_TINY, "--running", "4", "--queued", "2", "--step-tokens", "64"),
            *("--kv-budget", "4MiB", "--steps", "20", "--divisor", "16"),
        ),
        rows=("ways",),
        alone=True,
    ),
    # Its compiled mode is begun only with a minute left for the compiler.
    Stage(
        "prefill",
        *(120, 120),
        command=_timed("bench.prefill"),
        rehearsal=(*_TINY, "--tokens", "64", "--matrices", "64", "--rounds", "2"),
        rows=("prefill",),
        alone=True,
    ),
    Stage(
        "memcheck",
        *(90, 180),
        command=_bench("bench.gpu.memcheck", "--limit-s", "{limit}"),
        rehearsal=("--run", "--device", "cpu"),
        alone=True,
    ),
    Stage(
        "vmm",
        *(30, 60),
        command=_timed("bench.vmm"),
        gpu=("--driver", "cuda"),
        rehearsal=(
            *("--driver", "host", "--pages", "16KiB", "--runs", "1,4", "--rounds", "2"),
            *("--pairs", "3", "--sequences", "8", "--touch-mib", "2"),
        ),
        rows=("operations", "beside_a_kernel"),
        alone=True,
    ),
    Stage(
        "compile",
        *(100, 180),
        command=_timed("bench.compile"),
        rehearsal=(*_TINY, "--points", "2x64", "--pairs", "2"),
        rows=("steps",),
        alone=True,
    ),
    Stage(
        "jitter",
        *(30, 60),
        command=_timed("bench.jitter"),
        rehearsal=("--small",),
        rows=("ways",),
        alone=True,
    ),
    # A round is three processes, each of which trains, fragments and records.
    Stage(
        "allocator-bench",
        *(150, 240),
        command=_timed("bench.allocator_gpu"),
        rehearsal=("--device", "cpu", "--rounds", "1"),
        rows=("training", "fragments", "pairs"),
        alone=True,
    ),
    Stage(
        "allocator-memcheck",
        *(60, 120),
        command=_bench("bench.gpu.memcheck_allocator", "--limit-s", "{limit}"),
        rehearsal=("--run", "--device", "cpu"),
        alone=True,
    ),
    _level("kernels", 120, 300, ("rows",)),
    _level("kernels", 120, 240, ("rows",), "paper-prefill"),
    _level("kernels", 90, 180, ("rows",), "paper-decode"),
    _level("memory", 40, 120, _MEMORY),
    _level("memory", 30, 90, _MEMORY, "paper-allocation"),
    _level("memory", 30, 90, _MEMORY, "paper-fragmentation"),
    _level("offline", 150, 300, ("contexts", "rounds")),
    _level("offline", 120, 300, ("contexts", "rounds"), "paper-offline"),
    _level("serving", 120, 240, ("rates",)),
    _level("allocator", 30, 90, ("replays",)),
    _level("ablations", 100, 240, ("choices", "loops")),
    _level("peers", 100, 240, ("throughput",)),
)

# What one run has time for, with more than the least time for each stage.
GROUPS = {
    "correctness": (
        *("build", "contract", "cache", "attention", "engine", "graphs", "allocator"),
        *("memcheck", "jitter"),
    ),
    "sampling": ("build", "sampling"),
    "decode": ("build", "decode", "prefill", "allocator-bench"),
    "serving": ("build", "layout", "workload", "mapping", "vmm", "allocator-memcheck"),
    "levels": ("build", "level-kernels", "level-memory", "level-offline"),
    "levels-served": ("build", "level-serving", "level-ablations", "level-peers"),
    "papers": (
        *("build", "level-kernels-paper-prefill", "level-kernels-paper-decode"),
        *("level-memory-paper-allocation", "level-memory-paper-fragmentation"),
        "level-offline-paper-offline",
    ),
}


def asked_for(names: Sequence[str]) -> list[Stage]:
    """Those that are named, in their order; without names, all that are not ``alone``."""
    return [stage for stage in STAGES if (stage.name in names if names else not stage.alone)]


def limit_of(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Seconds for a stage, if ``left_s`` are left for it and those after it.

    The last one may have all that is left, and so may one that is asked for alone.
    """
    limit_s = left_s - sum(other.least_s for other in later)
    return min(stage.most_s, limit_s) if later else limit_s
