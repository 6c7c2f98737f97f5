"""`tests/gpu/test_second_opinion_gpu.py` on the fake libcuda, by cuda-python.

In a process of its own, for the dynamic loader has to find the fake by the real library's name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drivers import REAL_LIBCUDA, fake_library_path

ROOT = Path(__file__).resolve().parents[1]


def test_cuda_python_agrees_on_the_fake(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    (tmp_path / REAL_LIBCUDA).symlink_to(fake_library_path().resolve())
    report = tmp_path / "report"
    environment = os.environ | {
        "VATTN_GPU_TESTS_DEVICE": "cuda_fake",
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "FAKE_CUDA_REPORT": str(report),
    }
    file = "tests/gpu/test_second_opinion_gpu.py"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout
    assert report.read_text() == ""  # no rule broken, nothing left
