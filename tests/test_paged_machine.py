"""The scheduler over the paged baseline: random requests, beams, drafts, budgets and failures.

The machines are those of the scheduler's own tests; only the memory is another one. Every state is
checked, every output is compared with that of a request left alone, and no block is lost.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis.stateful import rule

import bench.paged.admission
import vattn.engine.admission
from tests.paged_model import ModelledMemory, assert_no_block_lost, make_paged
from tests.scheduler_model import machine_settings
from tests.test_beam_machine import BeamMachine
from tests.test_scheduler_machine import MAX_MODEL_LEN, PAGE_TOKENS, SchedulerMachine
from tests.test_speculation_scheduler import SpeculatingMachine

MOST_BLOCKS = 24  # what the machines give as a budget at most


@pytest.fixture(autouse=True)
def _short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts here are short: forks and waits must happen all the same."""
    monkeypatch.setattr(vattn.engine.admission, "MIN_WAIT_TOKENS", 4)
    monkeypatch.setattr(bench.paged.admission, "MIN_FORK_TOKENS", 2)


def make_memory(budget: int, slots: int, *, prefixes: bool = True) -> ModelledMemory:
    cache = make_paged(
        MOST_BLOCKS,
        block_tokens=PAGE_TOKENS,
        slots=slots,
        max_tokens=MAX_MODEL_LEN,
        order="token" if slots % 2 else "head",
    )
    return ModelledMemory(cache, budget, prefixes=prefixes)


class Paged:
    """Puts the paged memory under a machine."""

    engine: Any

    def make_memory(self, budget: int, slots: int, swap_pages: int, prefixes: bool) -> Any:
        return make_memory(budget, slots, prefixes=prefixes)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.memory.reset_prefix_cache()
        assert self.engine.memory.cache.blocks.kept == 0

    def teardown(self) -> None:
        super().teardown()  # type: ignore[misc]
        if hasattr(self, "engine"):
            assert_no_block_lost(self.engine.memory)


class PagedMachine(Paged, SchedulerMachine):
    pass


class PagedSpeculatingMachine(Paged, SpeculatingMachine):
    pass


class PagedBeamMachine(Paged, BeamMachine):
    pass


TestPaged = PagedMachine.TestCase
TestPaged.settings = machine_settings(60)
TestPagedSpeculation = PagedSpeculatingMachine.TestCase
TestPagedSpeculation.settings = machine_settings(40)
TestPagedBeams = PagedBeamMachine.TestCase
TestPagedBeams.settings = machine_settings(30)
