"""What the files of scheduler tests share: each test runs with and without a step in flight."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scheduler_model import FakeEngine
from vattn.engine.scheduler import Plan
from vattn.request import Request

__all__ = ["chunks", "ids", "pytest_generate_tests", "step_by_step", "steps_in_flight"]


def step_by_step(test: Any) -> Any:
    """A test that counts on each step's tokens having arrived before the next."""
    test.step_by_step = True
    return test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ahead = [0] if getattr(metafunc.function, "step_by_step", False) else [0, 1]
    metafunc.parametrize("steps_in_flight", ahead, indirect=True, ids=["", "ahead"][: len(ahead)])


@pytest.fixture(autouse=True)
def steps_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(FakeEngine, "steps_in_flight", request.param)
    return int(request.param)


def ids(requests: list[Request]) -> list[str]:
    return [request.id for request in requests]


def chunks(plan: Plan) -> list[tuple[str, int]]:
    return [(request.id, n) for request, n in plan.chunks]
