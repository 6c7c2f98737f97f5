"""Cases that need a process of their own, because they change what a process can change once."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.fake_cuda.fake import ROOT


def run_case(module: str, case: str) -> None:
    """Calls ``module.case()`` in a fresh interpreter; a failure there is one here.

    Raises:
        AssertionError: it did not end well; the message is what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {case}; {case}()"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
