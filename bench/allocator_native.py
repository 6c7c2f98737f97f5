"""The C++ half of ``bench.allocator``: finds ``vattn_allocator_replay`` and runs it.

``bench/native/allocator_replay.cpp`` says what it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.common import Json
from bench.provenance import ROOT

NAME = "vattn_allocator_replay"
POLICIES = ("vattn", "native", "expandable", "direct")
BUILD_COMMAND = (
    "cmake -S . -B build/bench -G Ninja -DVATTN_BUILD_TESTS=ON && "
    f"cmake --build build/bench --target {NAME}"
)
_SANITIZED = {"asan", "tsan"}  # folders of build/


class ReplayFailed(RuntimeError):
    """A check of the replay failed, or it could not run; the message is its own."""


@dataclass(frozen=True)
class Replay:
    """The program, and a fake libcuda other than the one that it was built with."""

    program: Path
    libcuda: Path | None = None

    @classmethod
    def find(cls, program: Path | None = None, libcuda: Path | None = None) -> Replay:
        """The program given, else the newest ``build/**/vattn_allocator_replay`` to be timed.

        Builds with a sanitizer are passed over.

        Raises:
            FileNotFoundError: there is none; the message has the command.
        """
        if program is not None:
            if not program.is_file():
                raise FileNotFoundError(f"--replay {program} does not exist")
            return cls(program, libcuda)
        found = [path for path in (ROOT / "build").rglob(NAME) if os.access(path, os.X_OK)]
        files = [path for path in found if path.is_file() and not _SANITIZED & {*path.parts}]
        if not files:
            raise FileNotFoundError(f"{NAME} is not built; run: {BUILD_COMMAND}")
        return cls(max(files, key=lambda path: path.stat().st_mtime), libcuda)

    def trace(self, raw: Path, policy: str, device_bytes: int, repeat: int) -> Json:
        """Replays a file of records through a policy.

        Raises:
            ReplayFailed: a check failed, or the file is not a trace.
        """
        return self._run(
            [str(raw), "--policy", policy, "--device-memory", str(device_bytes)],
            ["--repeat", str(repeat)],
        )

    def pair(self, size: int, policy: str, threads: int) -> Json:
        """Nanoseconds of a cached allocate and free of ``size`` bytes, alone and in threads.

        Raises:
            ReplayFailed: it could not run.
        """
        return self._run(["--pair", str(size), "--policy", policy, "--threads", str(threads)])

    def _run(self, *words: list[str]) -> Json:
        command = [str(self.program), *(word for part in words for word in part)]
        if self.libcuda is not None:
            command += ["--libcuda", str(self.libcuda)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ReplayFailed(done.stderr.strip() or f"{NAME} ended with {done.returncode}")
        found: Json = json.loads(done.stdout)
        return found
