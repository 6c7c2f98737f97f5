"""Random operations on a cache against a plain record of what each sequence must hold.

On the fake, sequences live on two streams that finish their work as late as they may, and a kernel
over every open sequence is still running when the next operation begins: what the cache unmaps or
reuses too early lands in the fake's log of violations. Free slots may keep what they held, and
sequences may go to host memory and come back: the record says what must be there again. A second
record says which pages each sequence shares, and what was copied into it.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    assert_all_given_back,
    launch,
    make_cache,
    make_pool,
)
from tests.kept import KeptSequences
from tests.kv_usage import UsageRecord
from vattn import OutOfPages, OutOfSlots, PagesGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from vattn.kv.layout import Order

SLOTS, MAX_TOKENS, PAGES = 5, 80, 150

tokens = st.integers(0, MAX_TOKENS)
pick = st.integers(0, SLOTS - 1)
Origin = Literal["fresh", "fork", "reopen"]
origins = st.sampled_from(["fresh", "fork", "reopen"])


@dataclass
class Saved:
    """A sequence in host memory."""

    slot: int  # where it was
    writers: list[int]
    anchor: int
    buffer: torch.Tensor


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
        self.saved: list[Saved] = []
        self.keeps = stale > 0
        self.seqs = KeptSequences(
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
        self.usage = UsageRecord(self.cache)

    # Helpers ------------------------------------------------------------------------------------

    def finish_work(self) -> None:
        """What the CPU does next to the bytes comes after what the device was told to do."""
        for stream in self.streams:
            self.driver.synchronize(stream)

    def chosen(self, index: int) -> int:
        slots = sorted(self.seqs.writers)
        return slots[index % len(slots)]

    def attempt(
        self, act: Callable[[], Any], most_pages: int | None = None, source: int = -1
    ) -> Any:
        """The result of `act`, or None if there is no room, which must then be true."""
        available = self.pool.core.available_pages()
        try:
            return act()
        except OutOfSlots:
            assert len({*self.seqs.writers, source} - {-1}) == SLOTS
        except OutOfPages:
            assert most_pages is None or most_pages > available
        except ValueError as error:  # a window layer no longer holds what the prefix needs
            assert self.window is not None
            assert "cannot go back" in str(error)
        return None

    def pages(self, slot: int, length: int) -> int:
        """So many pages come into use when the sequence grows."""
        return self.cache.pages_needed_many([slot], [length])

    def has_open(self) -> bool:
        return bool(self.seqs.writers)

    def has_kept(self) -> bool:
        return bool(self.seqs.lengths())

    def chosen_kept(self, index: int) -> tuple[int, int, int]:
        """A kept slot, and the lengths that it can be had at."""
        slots = sorted(self.seqs.lengths())
        slot = slots[index % len(slots)]
        return slot, *self.cache.kept(slot)

    def begin(self, origin: Origin, slot: int, shared: int, stream: int) -> int:
        """A sequence that goes on from what a slot keeps; what is shared is seen at once."""
        if origin == "reopen":
            self.usage.opened(self.seqs.reopen(slot, shared))
            child = slot
        else:
            child = self.seqs.fork(slot, shared, stream=stream)
            self.usage.forked(child)
        self.usage.observe(self.seqs.writers)
        return child

    # Rules --------------------------------------------------------------------------------------

    def open(self, slot: int | None, expected: int) -> None:
        def act() -> None:
            index = self.seqs.open(slot, expected)
            self.stream_of[index] = self.streams[index % 2]
            self.usage.opened(index)

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
        with self.usage.growing([slot]):
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
        with self.usage.growing(slots):
            self.attempt(
                lambda: self.cache.ensure_many(slots, lengths, stream=self.streams[0]),
                self.cache.pages_needed_many(slots, lengths),
            )
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

        child = self.attempt(lambda: self.seqs.fork(source, length, stream=stream))
        if child is not None:
            self.stream_of[child] = stream
            self.usage.forked(child)

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
            self.usage.assigned(pairs)

        self.attempt(act)

    @precondition(has_open)
    @rule(index=pick, keep=st.booleans())
    def release(self, index: int, keep: bool) -> None:
        slot = self.chosen(index)
        act = self.seqs.keep if keep and self.keeps else self.seqs.release
        act(slot, stream=self.stream_of.pop(slot))

    @precondition(has_kept)
    @rule(index=pick, shared=tokens, more=tokens, in_place=st.booleans())
    def admit(self, index: int, shared: int, more: int, in_place: bool) -> None:
        """A new sequence begins with what a slot keeps; the page count says if it can."""
        slot, lowest, kept = self.chosen_kept(index)
        shared = min(max(shared, lowest), kept)
        length = max(shared, more)
        stream = self.streams[more % 2]
        need = self.cache.admission_pages(
            length, source=slot, shared_tokens=shared, in_place=in_place
        )

        origin: Origin = "reopen" if in_place else "fork"
        child = self.attempt(lambda: self.begin(origin, slot, shared, stream), need, slot)
        if child is None:
            return
        self.stream_of[child] = stream
        if not in_place:  # all that the source may have lost is its end
            now = self.cache.kept(slot)
            assert now == (lowest, kept) or (now[0] == lowest and shared <= now[1] < kept)
        with self.usage.growing([child]):
            self.attempt(lambda: self.cache.ensure(child, length, stream=stream), need)
        self.finish_work()
        self.seqs.write(child)

    @precondition(has_kept)
    @rule(index=pick, in_place=st.booleans())
    def want_too_much(self, index: int, in_place: bool) -> None:
        slot, lowest, kept = self.chosen_kept(index)
        act = self.cache.reopen if in_place else self.cache.fork
        for length in {kept + 1, lowest - 1} - {-1}:
            with pytest.raises(PagesGone):
                act(slot, length)

    @precondition(has_kept)
    @rule(index=pick, forget=st.booleans())
    def forget_or_touch(self, index: int, forget: bool) -> None:
        slot, *_ = self.chosen_kept(index)
        if forget:
            self.cache.forget(slot)
        else:
            self.cache.touch(slot)

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), max_size=4))
    def evict_first(self, slots: list[int]) -> None:
        self.cache.evict_first([slot for slot in slots if slot not in self.seqs.writers])
        stats, core = self.cache.stats(), self.pool.core
        kept = stats.kept_bytes // stats.page_bytes
        assert core.unkept_pages() == max(0, core.available_pages() - kept)
        assert sum(map(self.cache.sole_pages, range(SLOTS))) <= kept

    @precondition(has_open)
    @rule(index=pick, keep=st.booleans())
    def swap_out(self, index: int, keep: bool) -> None:
        slot = self.chosen(index)
        stream = self.stream_of[slot]
        buffer = torch.full((self.cache.saved_bytes(slot),), 0xAB, dtype=torch.uint8)
        self.cache.save(slot, buffer, stream=stream)
        writers, anchor = self.seqs.writers[slot], self.cache.anchor(slot)
        self.saved.append(Saved(slot, list(writers), anchor, buffer))
        self.finish_work()
        self.release(sorted(self.seqs.writers).index(slot), keep)

    @precondition(lambda self: self.saved)
    @rule(index=pick, origin=origins, shared=tokens)
    def swap_in(self, index: int, origin: Origin, shared: int) -> None:
        """Into an empty slot, or one with as much of the beginning as there still is."""
        saved = self.saved.pop(index % len(self.saved))
        stream, total = self.streams[index % 2], len(saved.writers)
        lowest, kept = self.cache.kept(saved.slot)
        shared = max(lowest, min(shared, kept, total))
        same = self.seqs.kept.get(saved.slot, [])[:shared] == saved.writers[:shared]
        if origin == "fresh" or not kept or not same or shared > total:
            origin, shared = "fresh", 0
        need = self.cache.admission_pages(
            total,
            source=None if origin == "fresh" else saved.slot,
            shared_tokens=shared,
            in_place=origin == "reopen",
            anchor=saved.anchor,
        )

        def act() -> int:
            if origin == "fresh":
                return self.seqs.open(expected_tokens=total)
            return self.begin(origin, saved.slot, shared, stream)

        slot = self.attempt(act, need, -1 if origin == "fresh" else saved.slot)
        if origin == "fresh" and slot is not None:
            self.usage.opened(slot)
        if slot is None:
            return
        self.stream_of[slot] = stream

        def restore() -> bool:
            self.cache.restore(slot, total, saved.anchor, saved.buffer, shared, stream=stream)
            return True

        with self.usage.growing([slot], shared):
            restored = self.attempt(restore, need)
        if restored:
            self.finish_work()
            self.seqs.writers[slot] = saved.writers
            assert self.cache.anchor(slot) >= saved.anchor

    @precondition(has_open)
    @rule(index=pick)
    def mark_dirty(self, index: int) -> None:
        self.cache.mark_dirty(self.chosen(index))

    @rule()
    def trim(self) -> None:
        self.cache.trim()
        assert self.cache.stats().stale_bytes == self.cache.stats().kept_slots == 0
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
        self.usage.check(self.seqs.writers)
        stats = self.cache.stats()
        assert stats.live_bytes + stats.cover_bytes + stats.stale_bytes + stats.scratch_bytes == (
            self.pool.stats().used_bytes
        )
        assert stats.kept_bytes <= stats.stale_bytes
        assert stats.kept_slots == len(self.seqs.lengths())
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
        del self.seqs, self.usage, self.cache, self.pool, self.driver
        if self.fake:
            violations = self.fake.violations()
            if leaks := self.fake.leaks():  # a collection for every example would take all the time
                gc.collect()
                leaks = self.fake.leaks()
            self.fake.reset()
            assert violations == []
            assert leaks == []


CONFIGS = [
    pytest.param(
        {"kind": kind, "order": order, "window": window, "tile": tile},
        id=f"{kind}-{order}-{'full' if window is None else 'window'}-{tile}",
    )
    for kind in ("host_strict", "cuda_fake")
    for order in ("token", "head")
    for window in (None, 12)
    for tile in (1, 16)
]


@pytest.mark.parametrize("config", CONFIGS)
def test_random_operations(config: dict[str, Any]) -> None:
    """Short ones, which hypothesis makes shorter still when they fail."""
    machine = type("Machine", (CacheMachine,), config)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_long_walks(config: dict[str, Any]) -> None:
    """States that short ones do not come to: kept slots under pressure, forks of forks, swaps."""
    rng = random.Random(str(config))
    machine: Any = type("Machine", (CacheMachine,), config)()
    machine.make(rng.random() < 0.5, 1)

    def length() -> int:
        return rng.randrange(MAX_TOKENS + 1)

    def index() -> int:
        return rng.randrange(SLOTS)

    def some_open() -> bool:
        return bool(machine.seqs.writers)

    steps: list[tuple[int, Callable[[], bool] | None, Callable[[], None]]] = [
        (3, None, lambda: machine.open_any(length())),
        (4, some_open, lambda: machine.ensure(index(), length())),
        (4, some_open, lambda: machine.decode(index(), rng.randrange(1, 4))),
        (2, some_open, lambda: machine.ensure_many([rng.randrange(21) for _ in range(SLOTS)])),
        (1, some_open, lambda: machine.prepare(index(), length())),
        (2, some_open, lambda: machine.fork(index(), rng.choice([None, length()]))),
        (1, some_open, lambda: machine.truncate(index(), length())),
        (1, some_open, lambda: machine.assign([index() for _ in range(SLOTS)])),
        (6, some_open, lambda: machine.release(index(), rng.random() < 0.8)),
        (9, machine.has_kept, lambda: machine.admit(index(), length(), length(), coin())),
        (1, machine.has_kept, lambda: machine.want_too_much(index(), coin())),
        (1, machine.has_kept, lambda: machine.forget_or_touch(index(), coin())),
        (1, some_open, lambda: machine.mark_dirty(index())),
        (2, some_open, lambda: machine.swap_out(index(), True)),
        (3, lambda: bool(machine.saved), lambda: machine.swap_in(index(), origin(), length())),
        (2, None, lambda: machine.move_budget(rng.randrange(PAGES // 4, PAGES))),
    ]

    def coin() -> bool:
        return rng.random() < 0.5

    def origin() -> str:
        return rng.choice(["fresh", "fork", "reopen"])

    weights = [weight for weight, _, _ in steps]
    for _ in range(1000):
        _, may, act = rng.choices(steps, weights)[0]
        if may is None or may():
            act()
            machine.bytes_and_tables_are_right()
    assert machine.cache.evictions() > 0
    machine.teardown()
