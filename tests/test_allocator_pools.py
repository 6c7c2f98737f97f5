"""Pools, pausing and the order of calls: the cases of pool_cases.py, without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.pool_cases import CASES

if TYPE_CHECKING:
    from tests.own_process import Template

pytest_plugins = ("tests.own_process",)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_pools(own_process: Template, case: str) -> None:
    """In a process of its own: torch's allocator is swapped once."""
    own_process.run_case("tests.pool_cases", case)
