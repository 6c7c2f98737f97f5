"""Random operations on a cache against a plain record of what each sequence must hold.

On the fake, sequences live on two streams that finish their work as late as they may, and a kernel
over every open sequence is still running when the next operation begins: what the cache unmaps or
reuses too early lands in the fake's log of violations.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import vattn
from tests.drivers import fake_library_path, make_driver
from tests.fake_cuda.fake import FakeCuda, StreamMode
from tests.helpers import (
    SMALL_PAGE,
    Sequences,
    assert_all_given_back,
    launch,
    make_cache,
    make_pool,
)
from vattn import OutOfPages, OutOfSlots

if TYPE_CHECKING:
    from collections.abc import Callable

    from vattn.kv.layout import Order

SLOTS, MAX_TOKENS, PAGES = 4, 80, 150

tokens = st.integers(0, MAX_TOKENS)
pick = st.integers(0, SLOTS - 1)


class CacheMachine(RuleBasedStateMachine):
    kind: ClassVar[str]
    order: ClassVar[Order]
    window: ClassVar[int | None]
    tile: ClassVar[int]

    @initialize(together=st.booleans(), stale=st.integers(0, 9))
    def make(self, together: bool, stale: int) -> None:
        self.fake = FakeCuda(fake_library_path()) if self.kind == "cuda_fake" else None
        if self.fake:
            self.fake.reset()
            self.fake.configure(granularity=SMALL_PAGE, stream_mode=StreamMode.LAZY)
        self.driver = make_driver(self.kind)
        self.streams = [self.driver.create_stream() for _ in range(2)]
        self.stream_of: dict[int, int] = {}
        self.pool = make_pool(self.driver, pages=PAGES)
        plain = vattn.LayerSpec(1, 24, torch.float32)
        specs = [plain, vattn.LayerSpec(2, 40, torch.bfloat16, self.window), plain]
        self.seqs = Sequences(
            make_cache(
                self.pool,
                specs,
                max_seqs=SLOTS,
                max_tokens=MAX_TOKENS,
                order=self.order,
                layers_per_region=2 if together else 1,
                tile=self.tile,
                reuse_stale=stale > 0,
            )
        )
        self.cache = self.seqs.cache

    # Helpers ------------------------------------------------------------------------------------

    def finish_work(self) -> None:
        """What the CPU does next to the bytes comes after what the device was told to do."""
        for stream in self.streams:
            self.driver.synchronize(stream)

    def chosen(self, index: int) -> int:
        slots = sorted(self.seqs.writers)
        return slots[index % len(slots)]

    def attempt(self, act: Callable[[], Any], most_pages: int | None = None) -> Any:
        """The result of `act`, or None if there is no room, which must then be true."""
        available = self.pool.core.available_pages()
        try:
            return act()
        except OutOfSlots:
            assert len(self.seqs.writers) == SLOTS
        except OutOfPages:
            assert most_pages is None or most_pages > available
        except ValueError as error:  # a window layer no longer holds what the prefix needs
            assert self.window is not None
            assert "cannot go back" in str(error)
        return None

    def pages(self, slot: int, length: int) -> int:
        """At most so many pages come into use when the sequence grows."""
        cover = -(-max(length, 1) // self.tile) * self.tile
        held = self.cache.tokens(slot) // MAX_TOKENS  # a full one needs none
        return (
            0
            if held
            else sum(
                region.runs * -(-cover * region.token_bytes // self.pool.page_bytes)
                for region in self.cache.layout.regions
            )
        )

    def has_open(self) -> bool:
        return bool(self.seqs.writers)

    # Rules --------------------------------------------------------------------------------------

    def open(self, slot: int | None, expected: int) -> None:
        def act() -> None:
            index = self.seqs.open(slot, expected)
            self.stream_of[index] = self.streams[index % 2]

        self.attempt(act)

    @rule(expected=tokens)
    def open_any(self, expected: int) -> None:
        self.open(None, expected)

    @precondition(lambda self: len(self.seqs.writers) < SLOTS)
    @rule(index=pick)
    def open_particular(self, index: int) -> None:
        free = sorted(set(range(SLOTS)) - set(self.seqs.writers))
        self.open(free[index % len(free)], 0)

    def grow(self, slot: int, length: int) -> None:
        """Ensures on the sequence's stream; the CPU writes when the device is done."""
        stream = self.stream_of[slot]
        most = self.pages(slot, length)
        self.attempt(lambda: self.cache.ensure(slot, length, stream=stream), most)
        self.finish_work()
        self.seqs.write(slot)

    @precondition(has_open)
    @rule(index=pick, length=tokens)
    def ensure(self, index: int, length: int) -> None:
        self.grow(self.chosen(index), length)

    @precondition(has_open)
    @rule(index=pick, more=st.integers(1, 3))
    def decode(self, index: int, more: int) -> None:
        slot = self.chosen(index)
        self.grow(slot, min(self.cache.tokens(slot) + more, MAX_TOKENS))

    @precondition(has_open)
    @rule(more=st.lists(st.integers(0, 20), min_size=SLOTS, max_size=SLOTS))
    def ensure_many(self, more: list[int]) -> None:
        slots = sorted(self.seqs.writers)
        lengths = [
            min(self.cache.tokens(slot) + n, MAX_TOKENS)
            for slot, n in zip(slots, more, strict=False)
        ]
        self.finish_work()  # sequences of two streams meet on one
        before = [self.cache.tokens(slot) for slot in slots]
        self.attempt(lambda: self.cache.ensure_many(slots, lengths, stream=self.streams[0]))
        self.finish_work()
        after = [self.cache.tokens(slot) for slot in slots]
        assert after in (before, lengths)
        for slot in slots:
            self.seqs.write(slot)

    @precondition(has_open)
    @rule(index=pick, length=tokens)
    def prepare(self, index: int, length: int) -> None:
        slot = self.chosen(index)
        ticket = self.cache.prepare([slot], [length], stream=self.stream_of[slot])
        self.attempt(ticket.wait, self.pages(slot, length))

    @precondition(has_open)
    @rule(index=pick, length=st.none() | tokens)
    def fork(self, index: int, length: int | None) -> None:
        source = self.chosen(index)
        stream = self.stream_of[source]
        if length is not None:
            length = min(length, self.cache.tokens(source))

        def act() -> int:
            return int(self.cache.fork(source, length, stream=stream))

        child = self.attempt(act)
        if child is not None:
            self.seqs.writers[child] = self.seqs.writers[source][: self.cache.tokens(child)]
            self.stream_of[child] = stream

    @precondition(has_open)
    @rule(index=pick, length=tokens)
    def truncate(self, index: int, length: int) -> None:
        slot = self.chosen(index)
        length = min(length, self.cache.tokens(slot))

        def act() -> None:
            self.cache.truncate(slot, length, stream=self.stream_of[slot])
            del self.seqs.writers[slot][length:]

        self.attempt(act)

    @precondition(has_open)
    @rule(sources=st.lists(pick, min_size=1, max_size=SLOTS))
    def assign(self, sources: list[int]) -> None:
        slots = sorted(self.seqs.writers)
        pairs = [(to, self.chosen(i)) for to, i in zip(slots, sources, strict=False)]
        self.finish_work()
        stream = self.streams[1]
        for slot in slots:
            self.stream_of[slot] = stream

        def act() -> None:
            to, source = zip(*pairs, strict=True)
            self.cache.assign(to, source, stream=stream)
            was = {slot: list(writers) for slot, writers in self.seqs.writers.items()}
            for destination, origin in pairs:
                self.seqs.writers[destination] = list(was[origin])

        self.attempt(act)

    @precondition(has_open)
    @rule(index=pick)
    def release(self, index: int) -> None:
        slot = self.chosen(index)
        self.seqs.release(slot, stream=self.stream_of.pop(slot))

    @precondition(has_open)
    @rule(index=pick)
    def mark_dirty(self, index: int) -> None:
        self.cache.mark_dirty(self.chosen(index))

    @rule()
    def trim(self) -> None:
        self.cache.trim()
        assert self.cache.stats().stale_bytes == 0
        assert self.pool.stats().free_bytes == 0

    @rule(pages=st.integers(1, PAGES))
    def move_budget(self, pages: int) -> None:
        self.pool.set_budget(pages * self.pool.page_bytes)
        stats = self.pool.stats()
        live = stats.used_bytes - stats.stale_bytes
        assert stats.created_bytes <= max(stats.budget_bytes, live)

    # Invariants ---------------------------------------------------------------------------------

    @invariant()
    def bytes_and_tables_are_right(self) -> None:
        if not hasattr(self, "seqs"):
            return
        self.finish_work()
        self.seqs.check()
        stats = self.cache.stats()
        assert stats.live_bytes + stats.cover_bytes + stats.stale_bytes + stats.scratch_bytes == (
            self.pool.stats().used_bytes
        )
        assert self.driver.physical_bytes() == self.pool.stats().created_bytes
        if self.fake:
            for slot, stream in self.stream_of.items():
                if length := self.cache.tokens(slot):
                    launch(self.fake, self.cache, slot, length, stream)

    def teardown(self) -> None:
        if not hasattr(self, "seqs"):
            return
        for slot in list(self.seqs.writers):
            self.seqs.release(slot, stream=self.stream_of[slot])
        assert_all_given_back(self.cache)
        self.cache.close()
        for stream in self.streams:
            self.driver.synchronize(stream)
            self.driver.destroy_stream(stream)
        del self.seqs, self.cache, self.pool, self.driver
        if self.fake:
            violations = self.fake.violations()
            if leaks := self.fake.leaks():  # a collection for every example would take all the time
                gc.collect()
                leaks = self.fake.leaks()
            self.fake.reset()
            assert violations == []
            assert leaks == []


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("window", [None, 12], ids=["full", "window"])
@pytest.mark.parametrize("order", ["token", "head"])
@pytest.mark.parametrize("kind", ["host_strict", "cuda_fake"])
def test_random_operations(kind: str, order: Order, window: int | None, tile: int) -> None:
    config = {"kind": kind, "order": order, "window": window, "tile": tile}
    machine = type("Machine", (CacheMachine,), config)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
