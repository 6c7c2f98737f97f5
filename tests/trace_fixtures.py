"""Engines to trace, for modules that name this one in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vattn
from tests.engine_cases import make_llm


@pytest.fixture
def llm() -> Iterator[vattn.LLM]:
    llm = make_llm()
    yield llm
    llm.close()
