"""Runs a command with a time limit; at it, or by a signal, ends it and all that it started.

Standard library only, as all that bench.gpu.check needs before there is a native module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bench.gpu.rest import BEGUN, LOST
from bench.provenance import ROOT

# Between asking a command to end (it may write what it has) and ending it.
GRACE_S = 5.0
LEAST_S = 12.0  # a stage with less is not begun
# By which a command says that what it ran came to its own limit, as timeout(1) does.
TIMEOUT_CODE = 124
_LOOK_S = 0.05  # how often a running command is looked at
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cut:
    """Takes the signals that end a run, so that it can write what it has before it does."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


@dataclass(frozen=True)
class Ended:
    """How a command ended: by its exit ``code``, at its limit, or by a signal to us (``cut``)."""

    code: int
    at_limit: bool
    cut: bool
    seconds: float
    log: str


def run(command: Sequence[str], limit_s: float, environment: Mapping[str, str], cut: Cut) -> Ended:
    """Runs it in the root, for at most ``limit_s`` seconds; its output is kept in any case."""
    start = time.monotonic()
    deadline = start + max(0.0, limit_s - GRACE_S)
    at_limit = False
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment),
            start_new_session=True,
        )
        try:
            while process.poll() is None and cut.signal is None and not at_limit:
                time.sleep(_LOOK_S)
                at_limit = time.monotonic() > deadline
        finally:
            _end(process)
        out.seek(0)
        log = out.read()
    stopped_by_us = process.returncode != 0 and cut.signal is not None
    seconds = time.monotonic() - start
    return Ended(process.returncode, at_limit, stopped_by_us, seconds, log)


def run_tests(
    command: Sequence[str], limit_s: float, told: Mapping[str, str], begun: Path, cut: Cut
) -> Ended:
    """Runs tests; those that a lost context or a crash left out, once more, in a fresh process.

    Args:
        command: of pytest, with the plugin bench.gpu.rest.
        limit_s: for both.
        told: environment.
        begun: a file for the plugin.
        cut: ends either.
    """
    told = {**told, BEGUN: str(begun)}
    first = run(command, limit_s, told, cut)
    left_s = limit_s - first.seconds
    broken = first.code < 0 or LOST in first.log
    if not broken or first.at_limit or first.cut or left_s < LEAST_S:
        return first
    between = f"\n== the tests that are left, in a fresh process: up to {left_s:.0f} s\n"
    second = run(command, left_s, told, cut)
    return Ended(
        first.code,
        False,  # that tests failed says more
        second.cut,
        first.seconds + second.seconds,
        first.log + between + second.log,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a command that still runs, then kills whatever is left of it and of its group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
