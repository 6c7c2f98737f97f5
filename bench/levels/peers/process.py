"""A peer that runs in another process, as one side of the comparison."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

from bench.common import Json
from bench.offline_sides import Work
from bench.provenance import ROOT

MODULES = {"vllm": "vllm", "nano-vllm": "nanovllm"}
_CLOSE_S = 30.0
_TAIL_CHARACTERS = 400


def missing(peer: str) -> str | None:
    """Why a peer cannot be opened here, as far as that can be told without doing so."""
    module = MODULES[peer]
    return None if find_spec(module) else f"not installed: there is no module {module!r}"


class PeerError(RuntimeError):
    """What a peer in another process said before it gave up."""


class PeerProcess:
    """A :class:`bench.offline_sides.Side` whose engine is in a process of its own.

    Args:
        peer: one of :data:`MODULES`.
        settings: see :mod:`bench.levels.peers.worker`.
        open_s: seconds that opening may take.
        run_s: seconds that some work may take.

    Raises:
        PeerError: it could not be opened, with its reason.
    """

    def __init__(self, peer: str, settings: Json, *, open_s: float, run_s: float) -> None:
        self.name = peer
        self.seconds = 0.0  # of the last work, measured there: pipes do not count
        self._run_s = run_s
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.levels.peers.worker", peer, json.dumps(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # with all that it starts, so that all of it can be ended
        )
        try:
            self.about: Json = self._answer(open_s, "opening")["ready"]
        except BaseException:
            self.close()
            raise

    def run(self, work: Work) -> list[list[int]]:
        """See :class:`bench.offline_sides.Side`.

        Raises:
            PeerError: it ended, or took too long.
        """
        assert self._process.stdin is not None
        message = json.dumps({"prompts": work.prompts, "new_tokens": work.new_tokens})
        try:
            self._process.stdin.write(message + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} has ended: {self._tail()}") from None
        answer = self._answer(self._run_s, "its work")
        self.seconds = answer["seconds"]
        texts: list[list[int]] = answer["texts"]
        return texts

    def _answer(self, limit_s: float, what: str) -> Any:
        output = self._process.stdout
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise PeerError(f"{self.name}: {what} took more than {limit_s:g} s")
        line = output.readline()
        if not line:
            raise PeerError(f"{self.name} has ended: {self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _tail(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read()[-_TAIL_CHARACTERS:].strip()

    def close(self) -> None:
        """Ends it and whatever it has started. Twice is once."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            # Closing flushes: it may have ended with work that it did not read.
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_CLOSE_S)
        if not self._log.closed:
            with contextlib.suppress(ProcessLookupError):  # all of it is gone
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._log.close()
