"""The models of PyTorch's policies that bench.allocator has, against what PyTorch itself did."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.alloc_traces.trace_file import AllocTrace
from bench.allocator_native import NAME, Replay
from bench.common import Json
from bench.provenance import ROOT

_BUILD = ROOT / "build" / "bench"


def find_or_build(limit_s: float) -> Replay:
    """The replay program, built first if it is not there.

    Args:
        limit_s: for each of the two commands that build it.

    Raises:
        RuntimeError: there is no CMake, or it failed; the message has the end of what it said.
    """
    try:
        return Replay.find()
    except FileNotFoundError:
        pass
    cmake = _tool("cmake")
    if cmake is None:
        raise RuntimeError(f"{NAME} is not built, and there is no cmake to build it with")
    configure = [cmake, "-S", str(ROOT), "-B", str(_BUILD), "-DVATTN_BUILD_TESTS=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    ninja = _tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = str(len(os.sched_getaffinity(0)))
    targets = ["--target", "fake_cuda", NAME]
    for command in (configure, [cmake, "--build", str(_BUILD), "-j", jobs, *targets]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{NAME} was not built in {limit_s:.0f} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"{NAME} was not built: {(done.stdout + done.stderr)[-1500:]}")
    return Replay.find()


def _tool(name: str) -> str | None:
    """A program of the path, or beside the interpreter, where pip puts it."""
    beside = Path(sys.executable).with_name(name)
    return shutil.which(name) or (str(beside) if os.access(beside, os.X_OK) else None)


def modelled(replay: Replay, path: Path, policy: str, device_bytes: int, measured: Json) -> Json:
    """A recording through the model of a policy, beside PyTorch's own figures.

    Args:
        replay: the program.
        path: of the recording.
        policy: of PyTorch, which was in charge while it was recorded.
        device_bytes: of memory.
        measured: ``peak_reserved_bytes`` and ``peak_allocated_bytes`` by memory_stats.

    Returns:
        Both peaks and ``off_by``, how far the model's is from PyTorch's, as a share of that.

    Raises:
        ReplayFailed: a check of the replay failed.
    """
    trace = AllocTrace.load(path)
    raw = path.with_suffix(".raw")
    raw.write_bytes(trace.raw())
    row = replay.trace(raw, policy, device_bytes, 0)
    wanted = measured["peak_reserved_bytes"]
    return {
        "trace": trace.name,
        "policy": policy,
        "operations": row["operations"],
        "peak_live_bytes": row["peak_live_bytes"],
        "modelled_bytes": row["peak_physical_bytes"],
        "measured_bytes": wanted,
        "measured_allocated_bytes": measured["peak_allocated_bytes"],
        "off_by": abs(row["peak_physical_bytes"] / wanted - 1),
    }
