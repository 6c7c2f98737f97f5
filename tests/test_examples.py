"""The examples run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import one_thread

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name",
    ["async_llm.py", "custom_kernel.py", "decoding.py", "generate.py", "growing_embedding.py"],
)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 12


def test_a_kernel_of_ones_own_in_triton() -> None:
    pytest.importorskip("triton")
    path = ROOT / "examples" / "custom_kernel.py"
    assert len(path.read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton agrees with SDPA")


def test_policies_of_ones_own_are_better_where_they_should_be() -> None:
    from examples import custom_policy

    with one_thread():
        recent, most = custom_policy.hit_rate(None)
        found, also_most = custom_policy.hit_rate(custom_policy.Frequent())
        assert recent + 0.05 < found <= most == also_most
        by_arrival = custom_policy.ttft_steps("fcfs")
        by_length = custom_policy.ttft_steps(custom_policy.shortest_first)
        assert len(by_length) == len(by_arrival) == 16
        assert sum(by_length) < sum(by_arrival)
