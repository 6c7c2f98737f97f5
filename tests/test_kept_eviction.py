"""Kept slots: what goes first when pages or slots are needed, and when it may go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vattn
from tests.fake_cuda.fake import StreamMode
from tests.helpers import (
    SMALL_PAGE,
    layer_specs,
    make_cache,
    make_pool,
    memory_calls,
    slot_ranges,
)
from tests.kept import KeptSequences, fill_up, short_pool
from tests.test_stream_order import Device
from vattn import OutOfPages, OutOfSlots, PagesGone, PageState

if TYPE_CHECKING:
    from tests.fake_cuda.fake import FakeCuda
    from vattn import _core
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")


# What goes first --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_slot_used_longest_ago_is_shortened_evenly(driver: _core.Driver, order: Order) -> None:
    seqs = short_pool(driver, [90] * 3, order)
    cache = seqs.cache
    slots = [seqs.new(90) for _ in range(3)]
    for slot in slots:
        seqs.keep(slot)
    cache.touch(slots[0])
    d = seqs.open()
    assert d not in slots
    seqs.grow(d, 40)
    assert cache.kept_lengths()[[slots[0], slots[2]]].tolist() == [[0, 90], [0, 90]]
    lowest, left = cache.kept(slots[1])
    assert lowest == 0 < left < 90
    assert left == _ends_with_a_page(cache, left)
    mapped = [
        (states == PageState.KEPT).sum(axis=1)
        for states in cache.memory_map().slots[slots[1]].regions
    ]
    assert len({int(n) for runs in mapped for n in runs}) == 1  # no run is longer than another
    assert cache.evictions() == cache.stats().evicted_tokens == 90 - left
    assert not bool((cache.memory_map().slots[slots[1]].regions[0] == PageState.STALE).any())
    seqs.check()
    seqs.reopen(slots[1], left)
    seqs.check("what is left is right")
    seqs.end()


def _ends_with_a_page(cache: vattn.KVCache, tokens: int) -> int:
    """The longest length up to this one whose last page has no room for another token."""
    page, token = cache.pool.page_bytes, cache.layout.regions[0].token_bytes
    pages = tokens * token // page
    return (pages + (-(-(tokens + 1) * token // page) > pages + 1)) * page // token


@pytest.mark.parametrize("order", ORDERS)
def test_pages_that_nobody_keeps_go_first(driver: _core.Driver, order: Order) -> None:
    seqs = short_pool(driver, [90] * 3, order)
    a, b, c = (seqs.new(90) for _ in range(3))
    seqs.keep(a)
    seqs.keep(b)
    seqs.release(c)  # last
    d = seqs.open()
    assert d == c  # and its pages are used where they are
    seqs.release(d)
    e = seqs.open(slot=7)
    seqs.grow(e, 90)
    assert seqs.lengths() == {a: 90, b: 90}
    seqs.truncate(e, 10)
    f = seqs.open(slot=6)
    seqs.grow(f, 20)
    assert seqs.lengths() == {a: 90, b: 90}  # those of an open slot, too
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_shared_content_goes_last(driver: _core.Driver, order: Order) -> None:
    """A common beginning frees nothing until the last slot gives it up, so it stays till then."""
    seqs = short_pool(driver, [90, 90], order)
    a = seqs.new(70)
    b = seqs.fork(a, 60)
    seqs.grow(b, 80)
    c = seqs.fork(b, 60)
    seqs.grow(c, 80)
    for slot in (a, b, c):
        seqs.keep(slot)
    shared = _ends_with_a_page(seqs.cache, 60)
    seen = set()

    def check() -> None:
        lengths = [seqs.cache.kept(slot)[1] for slot in (a, b, c)]
        assert min(lengths) >= shared or max(lengths) <= shared
        assert lengths == sorted(lengths) or min(lengths) < shared
        seen.add(min(lengths) >= shared)

    for slot in (6, 7):
        fill_up(seqs, seqs.open(slot), check)
    assert seen == {True, False}
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_what_an_open_sequence_uses_stays_kept(driver: _core.Driver, order: Order) -> None:
    """Giving it up would free nothing."""
    seqs = short_pool(driver, [90, 50], order)
    a = seqs.new(90)
    b = seqs.fork(a, 86)
    seqs.keep(a)
    fill_up(seqs, seqs.open(5), seqs.check)
    assert seqs.lengths() == {a: _ends_with_a_page(seqs.cache, 86)}
    assert seqs.cache.evictions() == 90 - seqs.lengths()[a]
    seqs.release(b)
    seqs.end()


def test_content_below_the_lowest_length_is_worth_nothing(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=24)
    specs = layer_specs(pool, 2, window=16) + layer_specs(pool, 1)
    cache = make_cache(pool, specs, max_tokens=400)
    seqs = KeptSequences(cache)
    a = seqs.new(40)
    for tokens in range(41, 200, 7):
        seqs.grow(a, tokens)
    seqs.keep(a)
    lowest, kept = cache.kept(a)
    assert lowest > 100
    seen = set()

    def check() -> None:
        now = cache.kept(a)
        assert now == (0, 0) or now[0] == lowest <= now[1] <= kept
        seen.add(now)

    fill_up(seqs, seqs.open(slot=3), check)
    assert len(seen) > 2
    assert cache.kept(a) == (0, 0)
    assert cache.evictions() == kept
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_hit_makes_a_slot_the_one_used_last(driver: _core.Driver, order: Order) -> None:
    seqs = short_pool(driver, [50, 50], order)
    a, b = seqs.new(50), seqs.new(50)
    seqs.keep(a)
    seqs.keep(b)
    seqs.fork(a, 42)
    assert seqs.lengths()[a] == 50 > seqs.lengths()[b]
    seqs.check()
    seqs.end()


def test_stale_pages_of_another_cache_are_taken_before_a_kept_slot(driver: _core.Driver) -> None:
    pool = make_pool(driver)
    seqs, other = KeptSequences(make_cache(pool, max_seqs=8)), make_cache(pool)
    a, b = seqs.new(50), seqs.new(50)
    for slot in (a, b):
        seqs.keep(slot)
    theirs = other.open()
    other.ensure(theirs, 90)
    other.release(theirs)
    pool.set_budget(pool.stats().created_bytes)
    new = seqs.open(expected_tokens=50)
    assert new not in (a, b)
    seqs.grow(new, 50)
    assert seqs.lengths() == {a: 50, b: 50}
    seqs.check()
    other.close()
    seqs.end()


def test_what_was_shared_goes_in_its_turn_once_it_is_not(driver: _core.Driver) -> None:
    seqs = short_pool(driver, [90, 90, 50], "token")
    a, c = seqs.new(90), seqs.new(90)
    b = seqs.fork(a, 86)
    seqs.keep(a)
    seqs.keep(c)
    d = seqs.open(7)
    while seqs.lengths()[c] == 90:
        seqs.grow(d, seqs.cache.tokens(d) + 1)
    before = seqs.lengths()
    assert 43 < before[a] < 90
    seqs.release(b)
    while seqs.lengths() == before:
        seqs.grow(d, seqs.cache.tokens(d) + 1)
    assert seqs.lengths()[a] < before[a]
    assert seqs.lengths()[c] == before[c]
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["ensure", "fork", "assign"])
def test_mappings_of_what_another_slot_keeps_do_not_hold_it(
    pool: vattn.PagePool, order: Order, how: str
) -> None:
    """A slot that still maps what is kept elsewhere gets pages of its own: those, if need be."""
    seqs = KeptSequences(make_cache(pool, order=order, max_seqs=3))
    a, b = seqs.new(5), seqs.new(90)
    c = seqs.fork(b)
    seqs.keep(b)
    seqs.release(c)
    assert seqs.open(slot=c) == c
    if how == "fork":
        seqs.grow(a, 90)
        seqs.release(c)
    elif how == "assign":
        seqs.grow(a, 90)
        seqs.truncate(a, 20)
    pool.set_budget(pool.stats().created_bytes)
    if how == "fork":
        need = seqs.cache.admission_pages(100, source=a, shared_tokens=40)
        assert need <= pool.core.available_pages()
        assert seqs.fork(a, 40) == c
        seqs.grow(c, 100)
    elif how == "assign":
        seqs.assign([c], [a])
        seqs.grow(c, 90)
    else:
        assert seqs.cache.pages_needed_many([c], [90]) <= pool.core.available_pages()
        seqs.grow(c, 90)
    assert how == "assign" or seqs.lengths().get(b, 0) < 90
    seqs.check()
    seqs.end()


def covering_fork(driver: _core.Driver, spare: int) -> tuple[KeptSequences, int, int]:
    """A kept slot of 3 pages, whose fork needs 12 more, and another with a twin and tails.

    Nothing is free, and of the twins' 13 pages so many and no more remain beside the 3.
    """
    seqs = KeptSequences(make_cache(make_pool(driver), tile=96, max_tokens=192, max_seqs=6))
    a, b = seqs.new(20), seqs.new(90)
    c = seqs.fork(b, 90)
    for slot in (a, b, c):
        seqs.keep(slot)
    if spare < 14:
        seqs.cache.forget(c)
        seqs.cache.touch(a)
    seqs.cache.pool.set_budget((3 + spare) * seqs.cache.pool.page_bytes)
    return seqs, a, b


def test_a_fork_does_not_live_off_its_source(driver: _core.Driver) -> None:
    """Though nothing else comes free at once: the others share what they keep."""
    seqs, a, _ = covering_fork(driver, 14)
    b = seqs.fork(a, 20)
    assert seqs.lengths()[a] == 20
    seqs.grow(b, 96)
    seqs.check()
    seqs.end()


def test_a_fork_that_cannot_be_takes_nothing_from_others(driver: _core.Driver) -> None:
    seqs, a, b = covering_fork(driver, 10)
    before = seqs.lengths()
    assert before[a] == 20
    assert before[b] > 60
    with pytest.raises(OutOfPages):
        seqs.cache.fork(a, 20)
    assert seqs.lengths() == before
    seqs.check()
    seqs.end()


def test_a_lowered_budget_a_trim_and_a_new_user_take_what_is_kept(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    cache = seqs.cache
    slots = [seqs.new(90) for _ in range(3)]
    for slot in slots:
        seqs.keep(slot)
    page = pool.page_bytes
    pool.set_budget(pool.stats().created_bytes - 3 * page)
    a, b, c = (cache.kept(slot)[1] for slot in slots)
    assert (0 < a < 90, b, c) == (True, 90, 90)
    assert cache.evictions() == 90 - a
    seqs.check()
    seqs.open(slot=slots[1])
    assert cache.evictions() == 180 - a
    cache.forget(slots[2])
    assert cache.evictions() == 180 - a  # nobody took it
    with pytest.raises(PagesGone, match=f"slot {slots[2]} keeps nothing any more"):
        cache.reopen(slots[2], 1)
    cache.trim()
    assert cache.evictions() == 180
    assert cache.kept_lengths().tolist() == [[0, 0]] * 4
    for slot in (slots[0], slots[2]):
        for act in (cache.reopen, cache.fork):
            with pytest.raises(PagesGone, match=f"slot {slot} keeps nothing any more"):
                act(slot, 1)
    seqs.end()


# Which slot is opened ---------------------------------------------------------------------------


def test_kept_slots_are_opened_last(pool: vattn.PagePool) -> None:
    """As long as there are pages: with what fits best, the lowest index among equals."""
    seqs = KeptSequences(make_cache(pool, max_seqs=6))
    cache = seqs.cache
    a, b, c = (seqs.new(30) for _ in range(3))
    seqs.keep(b)
    seqs.keep(a)
    assert seqs.open() == 3
    seqs.release(c)
    assert seqs.open(expected_tokens=20) == c  # its pages are there
    assert [seqs.open(expected_tokens=20) for _ in range(2)] == [4, 5]
    assert cache.evictions() == 0
    cache.touch(b)
    assert seqs.open(expected_tokens=20) == a
    assert cache.evictions() == 30
    assert seqs.lengths() == {b: 30}
    assert seqs.open() == b
    with pytest.raises(OutOfSlots):
        cache.open()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_short_of_pages_those_of_a_kept_slot_are_used_in_place(
    driver: _core.Driver, order: Order
) -> None:
    """Steady state of a full cache: no driver call, though there are slots that keep nothing."""
    seqs = short_pool(driver, [90] * 4, order)
    for slot in [seqs.new(90) for _ in range(4)]:
        seqs.keep(slot)
    assert seqs.open() == 4  # of unknown length: nothing is given up for it
    seqs.release(4)
    calls = memory_calls(seqs.cache.pool)
    for turn in range(12):
        slot = seqs.open(expected_tokens=90)
        assert slot == turn % 4
        seqs.grow(slot, 90)
        assert len(seqs.lengths()) == 3
        seqs.keep(slot)
    assert memory_calls(seqs.cache.pool) == calls
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_short_sequence_takes_the_end_of_a_long_one(driver: _core.Driver, order: Order) -> None:
    """And no more: the slot stays kept."""
    seqs = short_pool(driver, [100, 100], order)
    long, other = seqs.new(100), seqs.new(100)
    seqs.keep(long)
    slot = seqs.open(expected_tokens=30)
    assert slot not in (long, other)
    seqs.grow(slot, 30)
    assert 0 < seqs.lengths()[long] < 100
    seqs.check()
    seqs.keep(other)
    assert seqs.open(expected_tokens=95) == long  # more than half of what it has left
    assert seqs.lengths() == {other: 100}
    seqs.check()
    seqs.end()


def test_a_fork_never_takes_the_slot_that_it_forks(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool, max_seqs=3))
    a, b, c = seqs.new(50), seqs.new(20), seqs.new(20)
    seqs.keep(a)
    with pytest.raises(OutOfSlots):
        seqs.cache.fork(a, 30)
    assert seqs.lengths() == {a: 50}
    seqs.keep(b)
    assert seqs.fork(a, 30) == b  # the only one
    assert seqs.lengths() == {a: 50}
    seqs.keep(c)
    seqs.release(b)
    assert seqs.fork(a, 30) == b  # the only one that keeps nothing
    assert seqs.lengths() == {a: 50, c: 20}
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_fork_under_pressure_keeps_what_it_shares(driver: _core.Driver, order: Order) -> None:
    """Pages for the tail are taken from the source's own end, and no further than needed."""
    seqs = short_pool(driver, [90], order)
    a = seqs.new(90)
    seqs.keep(a)
    b = seqs.fork(a, 50)
    assert 50 <= seqs.lengths()[a] < 90
    seqs.check()
    seqs.release(b)
    seqs.end()
    seqs = short_pool(driver, [50], order)  # not even for the tail beside it
    a = seqs.new(50)
    seqs.keep(a)
    before = seqs.cache.pool.stats()
    with pytest.raises(OutOfPages):
        seqs.cache.fork(a, 50)
    assert seqs.cache.pool.stats() == before
    assert seqs.lengths() == {a: 50}
    seqs.check()
    seqs.end()


# Streams ----------------------------------------------------------------------------------------


@pytest.fixture
def device(fake_cuda: FakeCuda) -> Device:
    return Device(fake_cuda, pages=4096)


@pytest.mark.parametrize("more", [0, 1])
def test_a_reopened_slot_is_used_after_its_last_kernel(device: Device, more: int) -> None:
    """On another stream, and without a call that blocks."""
    with device:
        seqs = KeptSequences(make_cache(device.pool))
        a = seqs.new(50)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.keep(a, stream=device.one)
        seqs.reopen(a, 50)
        seqs.cache.ensure(a, 50 + more, stream=device.two)
        device.kernel(seqs.cache, a, device.two)
        assert device.fake.pending(device.two) > 0
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        seqs.cache.close()


def test_a_kept_slot_is_not_unmapped_while_a_fork_copies_from_it(device: Device) -> None:
    with device:
        seqs = KeptSequences(make_cache(device.pool))
        a = seqs.new(50)
        seqs.keep(a, stream=device.one)
        device.fake.hold(device.two)
        b = seqs.fork(a, 45, stream=device.two)
        assert device.fake.pending(device.two) > 0
        device.blocks_until(device.two, seqs.cache.trim)
        seqs.check()
        seqs.release(b)
        seqs.end()


def test_a_fork_comes_after_the_last_kernel_of_a_kept_slot(device: Device) -> None:
    """What that kernel writes to the tail is copied."""
    with device:
        cache = make_cache(device.pool)
        a = int(cache.open())
        cache.ensure(a, 50)
        ((start, size),) = slot_ranges(cache, a, 50)
        device.fake.hold(device.one)
        device.driver.fill(start, 7, size, device.one)
        cache.release(a, keep=True, stream=device.one)
        b = int(cache.fork(a, 45, stream=device.two))
        assert device.fake.pending(device.two) > 0
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        ((start, size),) = slot_ranges(cache, b, 45)
        assert device.fake.read(start, size) == b"\7" * size
        cache.check()
        cache.close()


def test_a_kept_slot_is_not_unmapped_before_a_copy_on_write(fake_cuda: FakeCuda) -> None:
    """Work is left undone for as long as may be; a page unmapped too early is in the fake's log."""
    fake_cuda.configure(stream_mode=StreamMode.LAZY)
    with Device(fake_cuda, pages=4096) as device:
        seqs = KeptSequences(make_cache(device.pool))
        a = seqs.open()
        seqs.cache.ensure(a, 90, stream=device.two)
        device.driver.synchronize(device.two)
        seqs.write(a)
        b = seqs.fork(a, stream=device.two)
        seqs.keep(a, stream=device.two)
        seqs.cache.truncate(b, 30, stream=device.two)
        del seqs.writers[b][30:]
        seqs.cache.ensure(b, 31, stream=device.two)
        assert device.fake.pending(device.two) > 0
        seqs.cache.trim()
        device.driver.synchronize(device.two)
        seqs.write(b)
        seqs.check()
        seqs.end()


def test_content_whose_kernels_run_is_taken_last(fake_cuda: FakeCuda) -> None:
    """With room for two sequences: what has finished goes first, though it was used later."""
    device = Device(fake_cuda, pages=16)
    with device:
        seqs = KeptSequences(make_cache(device.pool))
        a, b = seqs.new(50), seqs.new(50)  # 8 pages each
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.keep(a, stream=device.one)
        seqs.keep(b, stream=device.two)
        c = seqs.open(slot=2)
        seqs.grow(c, 50, stream=device.two)
        assert seqs.lengths() == {a: 50}
        device.blocks_until(device.one, lambda: seqs.grow(c, 57, stream=device.two))
        assert seqs.lengths() == {a: 49}
        assert device.pool.stats().created_bytes == 16 * SMALL_PAGE
        seqs.check()
        seqs.end()
