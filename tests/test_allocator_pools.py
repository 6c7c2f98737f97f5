"""Pools, pausing and the order of calls: the cases of pool_cases.py, without a GPU."""

from __future__ import annotations

import pytest

from tests.own_process import run_case
from tests.pool_cases import CASES


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_pools(case: str) -> None:
    """In a process of its own: torch's allocator is swapped once."""
    run_case("tests.pool_cases", case)
