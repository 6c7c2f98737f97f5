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
    """

    name: str
    least_s: float
    most_s: float
    tests: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()

    def words(self, json: str, limit_s: float, *, rehearse: bool = False) -> list[str]:
        """What follows the interpreter's name.

        Args:
            json: where it writes results, for ``{json}``.
            limit_s: seconds it has; ``{budget}`` is what is left of them for measuring.
            rehearse: on a CPU, at a tiny setting.

        Raises:
            FileNotFoundError: a pattern matches no file.
        """
        if self.tests:
            return [*PYTEST, *(self.rehearsal if rehearse else ("-m", "gpu")), *self._files()]
        # Imports come before what a benchmark counts as its budget, what it has begun after it.
        budget_s = _REHEARSED_S if rehearse else max(5.0, limit_s - max(20.0, 0.3 * limit_s))
        replace = {"{json}": json, "{budget}": f"{budget_s:.0f}"}
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
    *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"),
)
PIP = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", ".")


def _bench(module: str, *words: str) -> tuple[str, ...]:
    return ("-m", module, *words, "--json", "{json}")


def _timed(module: str) -> tuple[str, ...]:
    return _bench(module, "--budget-s", "{budget}")


# Seconds to build a model and run it a little, on a CPU.
_TINY = ("--device", "cpu", "--shape", "tiny-llama")

# Correctness first, then what decides most. A stage may use what earlier ones left over.
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
        ),
    ),
    Stage("attention", 25, 60, tests=("tests/gpu/test_attention*.py",)),
    Stage("engine", 35, 90, tests=("tests/gpu/test_engine*.py",)),
    Stage("graphs", 20, 60, tests=("tests/gpu/test_graphs*.py",)),
    Stage(
        "decode",
        *(75, 150),
        command=_timed("bench.decode"),
        rehearsal=(*_TINY, "--points", "2x64", "--rounds", "2", "--engine-steps", "3"),
    ),
    Stage("layout", 70, 150, command=_timed("bench.layout"), rehearsal=("--small",)),
    Stage(
        "workload",
        *(55, 110),
        command=_timed("bench.workload"),
        rehearsal=(
            *(*_TINY, "--nano-shape", "tiny-qwen3", "--requests", "4", "--lengths", "4,8"),
            *("--concurrency", "1,2", "--sequences", "4", "--versus-s", "5"),
        ),
    ),
    Stage(
        "mapping",
        *(25, 50),
        command=_timed("bench.mapping"),
        rehearsal=(
            *(*_TINY, "--running", "4", "--queued", "2", "--step-tokens", "64"),
            *("--kv-budget", "4MiB", "--steps", "20", "--divisor", "16"),
        ),
    ),
    Stage(
        "prefill",
        *(25, 45),
        command=_timed("bench.prefill"),
        rehearsal=(*_TINY, "--tokens", "64", "--matrices", "64", "--rounds", "2"),
    ),
    Stage(
        "memcheck",
        *(45, 90),
        command=_bench("bench.gpu.memcheck", "--limit-s", "{budget}"),
        rehearsal=("--run", "--device", "cpu"),
    ),
    Stage(
        "vmm",
        *(20, 60),
        command=_timed("bench.vmm"),
        gpu=("--driver", "cuda"),
        rehearsal=(
            *("--driver", "host", "--pages", "16KiB", "--runs", "1,4", "--rounds", "2"),
            *("--pairs", "3", "--sequences", "8", "--touch-mib", "2"),
        ),
    ),
    Stage(
        "compile",
        *(20, 70),
        command=_timed("bench.compile"),
        rehearsal=(*_TINY, "--points", "2x64", "--pairs", "2"),
    ),
    Stage("jitter", 12, 40, command=_timed("bench.jitter"), rehearsal=("--small",)),
)


def limit_of(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Seconds for a stage, if ``left_s`` are left for it and those after it.

    The last one may have all that is left, and so may one that is asked for alone.
    """
    limit_s = left_s - sum(other.least_s for other in later)
    return min(stage.most_s, limit_s) if later else limit_s
