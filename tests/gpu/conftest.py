"""Every test in this folder needs a CUDA device; without one it is skipped, with the reason.

Kernels fail later than the calls that launch them, so the device is waited for after each test: an
error is of the test that caused it. An error that stays ends the run, since every test after it
would fail for it; bench.gpu.check then runs the rest in a fresh process.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.rest import LOST
from bench.provenance import gpu_missing

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get("VATTN_GPU_TESTS_DEVICE", "cuda")

cuda: Any = torch.cuda  # parts of it are untyped
_lost = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE != "cuda":
        return
    reason = gpu_missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    return DEVICE


def wait_for_device() -> None:
    """Raises what kernels and copies so far have failed with."""
    if cuda.is_initialized():
        cuda.synchronize()


@pytest.fixture(autouse=True)
def _errors_are_of_this_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if DEVICE != "cuda":
        return
    try:
        wait_for_device()
    except RuntimeError:
        try:
            wait_for_device()  # an error that does not stay is reported once
        except RuntimeError:
            request.config.stash[_lost] = True
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Ends the run after the reports of the test, so that its error is among them."""
    result = yield
    if item.config.stash.get(_lost, False):
        pytest.exit(f"{LOST} {item.nodeid}", returncode=pytest.ExitCode.INTERRUPTED)
    return result
