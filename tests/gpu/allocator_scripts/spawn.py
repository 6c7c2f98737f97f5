"""Runs programs of this folder, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DEVICE = os.environ.get("VATTN_GPU_TESTS_DEVICE", "cuda")
LIMIT_S = 200
_SHOWN_CHARS = 6000
# What a caller may have set for PyTorch's own allocator is not what is tested.
_UNSET = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VATTN_BUDGET", "VATTN_ALLOCATOR")


def spawn(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts ``python WORDS`` in the repository's root."""
    told = {name: value for name, value in os.environ.items() if name not in _UNSET}
    told |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=told,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What it printed, once it has ended.

    Raises:
        AssertionError: it failed, or came to no end; the message has the end of what it said.
    """
    try:
        out, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"no end in {LIMIT_S} s\n{errors[-_SHOWN_CHARS:]}") from None
    said = f"exit code {process.returncode}\n{out[-_SHOWN_CHARS:]}\n{errors[-_SHOWN_CHARS:]}"
    assert process.returncode == 0, said
    return out


def scenario(module: str, name: str, *arguments: str) -> Any:
    """Runs a function of one of these modules; what it printed as JSON, None for nothing."""
    process = spawn("-m", f"tests.gpu.allocator_scripts.{module}", name, *arguments)
    lines = output_of(process).strip().splitlines()
    return json.loads(lines[-1]) if lines else None
