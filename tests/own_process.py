"""Cases that need a process of their own, because they change what a process can change once.

Each is a fork of a template that has imported torch and vattn's engine, which takes seconds, and
has done nothing else. A fork ends as an interpreter does, with atexit and destructors, but leaves
what the template had imported alone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from typing import IO, TYPE_CHECKING

import pytest

from tests.fake_cuda.fake import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMIT_S = 280


class Template:
    """A process that forks another one for each piece of code that it is told to run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.own_process"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """What ``python -c code`` does and writes to stderr."""
        asks, answers = self._process.stdin, self._process.stdout
        assert asks is not None
        assert answers is not None
        with tempfile.NamedTemporaryFile("r") as stderr:
            asks.write(json.dumps({"code": code, "stderr": stderr.name}) + "\n")
            answer = answers.readline()
            assert answer, "the template has ended"
            return subprocess.CompletedProcess(code, int(answer), stderr=stderr.read())

    def run_case(self, module: str, case: str) -> None:
        """Calls ``module.case()``; a failure there is one here.

        Raises:
            AssertionError: it did not end well; the message is what it wrote to stderr.
        """
        done = self.run(f"from {module} import {case}; {case}()")
        assert done.returncode == 0, done.stderr

    def run_module(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What ``python -m module arguments`` does and writes to stderr."""
        argv = [module, *arguments]
        return self.run(
            f"import runpy, sys; sys.argv = {argv!r}; "
            f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        )

    def close(self) -> None:
        """Ends the template."""
        self._process.communicate()


@pytest.fixture(scope="session")
def own_process() -> Iterator[Template]:
    """For modules that name this one in `pytest_plugins`."""
    template = Template()
    yield template
    template.close()


def main() -> None:
    """The template: forks for every line of stdin, answers with the exit codes."""
    import torch  # noqa: F401

    from vattn import LLM  # noqa: F401

    gc.freeze()  # collecting in a fork would copy all of it
    for line in sys.stdin:
        ask = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(ask["stderr"], "w") as stderr:
                _run(ask["code"], stderr)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    gc.unfreeze()


def _run(code: str, stderr: IO[str]) -> None:
    """In the fork. Its time is limited by an alarm, which ends the process."""
    signal.alarm(_LIMIT_S)
    for stream in (1, 2):
        os.dup2(stderr.fileno(), stream)
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
