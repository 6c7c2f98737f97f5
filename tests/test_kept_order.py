"""Kept slots that go first because somebody says so, and what they alone hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import vattn
from tests.helpers import (
    SMALL_PAGE,
    make_cache,
    make_pool,
)
from tests.kept import KeptSequences, fill_up, held_pages, short_pool

if TYPE_CHECKING:
    from vattn import _core
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")


@pytest.mark.parametrize("order", ORDERS)
def test_whoever_is_named_goes_first(driver: _core.Driver, order: Order) -> None:
    seqs = short_pool(driver, [50] * 4, order)
    cache = seqs.cache
    a, b, c, d = (seqs.new(50) for _ in range(4))
    for slot in (a, b, c, d):
        seqs.keep(slot)
    cache.evict_first([c, b, c])  # named twice: the first time counts
    e = seqs.open(7)
    gone: list[int] = []
    for tokens in range(1, 90):
        seqs.grow(e, tokens)
        gone += [slot for slot in (a, b, c, d) if slot not in (*seqs.lengths(), *gone)]
        shortened = {slot for slot, kept in seqs.lengths().items() if kept < 50}
        assert len(shortened) <= 1  # each in its turn
    assert gone == [c]
    assert seqs.lengths()[b] < 50 == seqs.lengths()[a] == seqs.lengths()[d]
    seqs.check()
    cache.evict_first([d])
    seqs.release(e)
    lengths = seqs.lengths()
    fill = seqs.open(6)
    seqs.grow(fill, 90)
    assert seqs.lengths() == lengths  # there are pages that nobody keeps
    seqs.grow(seqs.open(5), 40)
    assert seqs.lengths().get(d, 0) < 50 == seqs.lengths()[a]
    seqs.check()
    seqs.end()


def test_the_order_of_the_others_stays_and_a_touch_comes_after(driver: _core.Driver) -> None:
    seqs = short_pool(driver, [30] * 5, "token")
    cache = seqs.cache
    slots = [seqs.new(30) for _ in range(5)]
    for slot in slots:
        seqs.keep(slot)
    cache.evict_first(slots[3:4])
    cache.touch(slots[0])
    e = seqs.open(7)
    gone: list[int] = []
    fill_up(seqs, e, lambda: gone.extend(s for s in slots if s not in (*seqs.lengths(), *gone)))
    assert gone[:3] == [slots[3], slots[1], slots[2]]
    assert slots[0] not in gone[:-1]
    seqs.end()


def test_an_order_holds_until_the_next(driver: _core.Driver) -> None:
    """Whoever was named before goes by its last use again."""
    seqs = short_pool(driver, [30] * 5, "token")
    cache = seqs.cache
    slots = [seqs.new(30) for _ in range(5)]
    for slot in slots:
        seqs.keep(slot)
    cache.evict_first(slots[2:5])
    cache.evict_first(slots[3:4])
    e = seqs.open(7)
    gone: list[int] = []
    fill_up(seqs, e, lambda: gone.extend(s for s in slots if s not in (*seqs.lengths(), *gone)))
    assert gone[:3] == [slots[3], slots[0], slots[1]]
    seqs.end()


def test_an_order_can_be_taken_back(driver: _core.Driver) -> None:
    seqs = short_pool(driver, [30] * 3, "token")
    slots = [seqs.new(30) for _ in range(3)]
    for slot in slots:
        seqs.keep(slot)
    seqs.cache.evict_first(slots[1:])
    seqs.cache.evict_first([])
    seqs.grow(seqs.open(7), 20)
    assert seqs.lengths().get(slots[0], 0) < 30 == seqs.lengths()[slots[1]]
    seqs.check()
    seqs.end()


def test_in_a_given_order_the_first_is_opened_or_none(driver: _core.Driver) -> None:
    """A precious slot is not taken whole because it alone has pages of its own at the end."""
    seqs = KeptSequences(make_cache(make_pool(driver), max_seqs=8))
    gauge = seqs.cache.layout.regions[0].token_bytes
    full = next(n for n in range(90, 0, -1) if n * gauge % SMALL_PAGE == 0)
    precious, cheap = seqs.new(100), seqs.new(full)
    twin = seqs.fork(cheap, full)  # with the same last page
    for slot in (precious, cheap, twin):
        seqs.keep(slot)
    seqs.cache.pool.set_budget(seqs.cache.pool.stats().created_bytes)
    seqs.cache.evict_first([cheap, twin])
    new = seqs.open(expected_tokens=60)
    assert new not in (precious, cheap, twin)
    seqs.grow(new, 20)
    seqs.check()
    seqs.cache.evict_first([precious, cheap, twin])
    seqs.release(new)
    assert seqs.open(expected_tokens=100) == precious
    seqs.check()
    seqs.end()


def test_who_cannot_be_named_to_go_first(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    a, b = seqs.new(20), seqs.new(20)
    seqs.keep(a)
    with pytest.raises(ValueError, match=f"slot {b} is open, and so in use"):
        seqs.cache.evict_first([a, b])
    with pytest.raises(ValueError, match="slot 99 is not one of the"):
        seqs.cache.evict_first([a, 99])
    with pytest.raises(TypeError, match="int32"):
        seqs.cache.evict_first(np.array([a]))
    assert seqs.lengths() == {a: 20}
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_pages_that_come_free_with_one_slot(driver: _core.Driver, order: Order) -> None:
    seqs = KeptSequences(make_cache(make_pool(driver), order=order, max_seqs=8))
    cache, core = seqs.cache, seqs.cache.pool.core
    available = core.available_pages()
    assert core.unkept_pages() == available
    a = seqs.new(90)
    assert cache.sole_pages(a) == 0  # it is open
    b = seqs.fork(a, 60)
    seqs.keep(a)
    shared = cache.usage(b).shared_pages
    assert cache.sole_pages(a) == held_pages(cache, 90) - shared
    seqs.keep(b)
    both = cache.sole_pages(a) + cache.sole_pages(b) + shared
    assert core.available_pages() == available
    assert core.unkept_pages() == available - both
    # Going on from it takes nothing that is kept; what it needs beside that may.
    new = cache.admission_pages(100, source=a, shared_tokens=80, in_place=True, new_only=True)
    kept = cache.admission_pages(100, source=a, shared_tokens=80, in_place=True) - new
    assert kept == held_pages(cache, 80)
    assert cache.admission_pages(100, new_only=True) == cache.admission_pages(100)
    cache.forget(a)
    seqs.kept.pop(a)
    assert cache.sole_pages(b) == held_pages(cache, 60)
    assert core.unkept_pages() == available - held_pages(cache, 60)
    seqs.check()
    seqs.end()
