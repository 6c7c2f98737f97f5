"""Pools, pausing and the order of calls: the cases of pool_cases.py, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fake_cuda.fake import ROOT
from tests.pool_cases import CASES


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_pools(case: str) -> None:
    """In a process of its own: torch's allocator is swapped once."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.pool_cases import {case}; {case}()"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
