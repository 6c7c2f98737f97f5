"""A short soak on every kind of driver and policy; `make soak` runs the long one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.soak import Soak

CASES: list[dict[str, Any]] = [
    {"kind": "host_strict"},
    {"kind": "host_strict", "window": True, "policy": "priority"},
    {"kind": "cuda_fake", "window": True},
    {"kind": "host_strict", "ahead": True},
    {"kind": "host_strict", "window": True, "policy": "priority", "ahead": True},
    {"kind": "cuda_fake", "window": True, "ahead": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_is_answered(case: dict[str, Any], seed: int) -> None:
    soak = Soak(seed=seed, check_every=3, **case)
    soak.run(120)
    assert soak.outcomes["length"] > 40, soak.outcomes
    assert soak.outcomes["abort"] > 0, soak.outcomes
    assert soak.stats.num_preemptions > 0
    assert soak.stats.requests_forked > 0
    assert soak.stats.requests_reopened > 0
