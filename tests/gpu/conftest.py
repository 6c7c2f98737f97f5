"""Every test in this folder needs a CUDA device; without one it is skipped, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.provenance import gpu_missing

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get("VATTN_GPU_TESTS_DEVICE", "cuda")


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
