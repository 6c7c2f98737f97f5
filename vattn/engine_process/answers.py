"""Answers to the owner's questions, between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vattn.engine.engine import Engine
from vattn.engine_process.messages import Answer, Ask, BudgetReport, PageRows, Stats, Trouble
from vattn.engine_process.page_rows import page_rows
from vattn.kv.pool import PagePool

_log = logging.getLogger(__name__)


class Answers:
    """What an engine can be asked and ordered.

    Args:
        engine: between two steps.
        owners: the slots that are in use, with the owner's handle and the index of the sample.
        stats: figures of now.
    """

    def __init__(
        self,
        engine: Engine,
        owners: Callable[[], dict[int, tuple[int, int]]],
        stats: Callable[[], Stats],
    ) -> None:
        self._engine = engine
        self._owners = owners
        self._by_name: dict[str, Callable[[Any], Any]] = {
            "set_budget": self._set_budget,
            "memory_map": self._memory_map,
            "reset_prefix_cache": lambda _: engine.storage.memory.reset_prefix_cache(),
            "check": lambda _: self._check(),
            "stats": lambda _: stats(),
        }

    def answer(self, question: Ask) -> Answer | Trouble:
        """The answer, or why there is none. What breaks the engine itself is raised."""
        try:
            if (answer := self._by_name.get(question.what)) is None:
                known = ", ".join(self._by_name)
                raise ValueError(f"what={question.what!r} must be one of {known}")
            return Answer(question.number, answer(question.argument))
        except (ValueError, TypeError) as error:
            return Trouble(question.number, str(error), is_input=True)
        except Exception as error:
            _log.exception("%s failed", question.what)
            return Trouble(question.number, f"{type(error).__name__}: {error}", is_input=False)

    def _pool(self) -> PagePool:
        pool = self._engine.storage.pool
        if pool is None:
            raise ValueError("the engine's storage has no pool of pages")
        return pool

    def _set_budget(self, budget_bytes: int | str) -> BudgetReport:
        pool, engine = self._pool(), self._engine
        before = pool.stats()
        engine.storage.memory.set_budget(budget_bytes)
        after = pool.stats()
        return BudgetReport(
            budget_before=before.budget_bytes,
            budget=after.budget_bytes,
            created_before=before.created_bytes,
            created=after.created_bytes,
            returned=max(0, before.created_bytes - after.created_bytes),
        )

    def _memory_map(self, max_cells: Any) -> PageRows:
        if isinstance(max_cells, bool) or not isinstance(max_cells, int) or max_cells < 1:
            raise ValueError(f"max_cells={max_cells!r} must be a positive whole number")
        self._pool()
        return page_rows(self._engine.cache, max_cells, self._owners())

    def _check(self) -> dict[str, int]:
        """What tests want to know once all is found sound."""
        engine = self._engine
        engine.check()
        if engine.storage.pool is not None:
            engine.storage.pool.check()
        stats = engine.storage.cache.stats()
        return {
            "open_slots": stats.open_slots,
            "live_bytes": stats.live_bytes,
            "cover_bytes": stats.cover_bytes,
            "stale_bytes": stats.stale_bytes,
            "kept_bytes": stats.kept_bytes,
            "unfinished": int(engine.has_unfinished),
        }
