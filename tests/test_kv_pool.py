"""`vattn.KVCache` and its pool: budgets, reuse of stale pages, pages ahead, shared pools."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import vattn
from tests.helpers import (
    Sequences,
    assert_all_given_back,
    layer_specs,
    make_cache,
    make_pool,
    memory_calls,
)

if TYPE_CHECKING:
    from vattn import _core

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")


# Budgets ----------------------------------------------------------------------------------------


def test_an_exhausted_budget_changes_nothing(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=20)
    seqs = Sequences(make_cache(pool))
    a, b = seqs.new(60), seqs.new(60)  # 9 pages each
    before = seqs.cache.stats()
    with pytest.raises(vattn.OutOfPages, match=r"the budget is 20 pages, live sequences hold 18"):
        seqs.cache.ensure(a, 100)
    with pytest.raises(vattn.OutOfPages):
        seqs.cache.ensure_many([a, b], [70, 75])  # one of them would fit
    with pytest.raises(vattn.OutOfPages):
        seqs.cache.prepare([a], [100]).wait()
    seqs.check("after ensure")
    assert seqs.cache.stats().tokens == before.tokens
    assert seqs.cache.stats().live_bytes == before.live_bytes
    seqs.release(b)
    seqs.grow(a, 100)
    c = seqs.new(30)
    with pytest.raises(vattn.OutOfPages):
        seqs.assign([c], [a])  # no room for the staging copy
    seqs.check("after assign")
    seqs.end()


def test_a_fork_that_does_not_fit_opens_nothing(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=9)
    seqs = Sequences(make_cache(pool))
    a = seqs.new(60)
    with pytest.raises(vattn.OutOfPages):
        seqs.fork(a)
    assert seqs.cache.stats().open_slots == 1
    b = seqs.fork(a, 0)
    seqs.check()
    seqs.release(b)
    seqs.end()


def test_a_budget_can_be_lowered_while_in_use(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=60)
    page = pool.page_bytes
    seqs = Sequences(make_cache(pool))
    slots = [seqs.new(100) for _ in range(4)]  # 15 pages each
    seqs.release(slots[0])
    pool.set_budget(50 * page)
    seqs.check("stale pages went first")
    assert driver.physical_bytes() <= 50 * page
    pool.set_budget(20 * page)
    seqs.check("below what is live")
    assert driver.physical_bytes() == 45 * page
    with pytest.raises(vattn.OutOfPages, match="the budget is 20 pages, live sequences hold 45"):
        seqs.cache.ensure(seqs.open(), 1)
    seqs.release(slots[1])
    assert driver.physical_bytes() == 30 * page
    seqs.release(slots[2])
    assert driver.physical_bytes() == 20 * page
    seqs.check("at the budget")
    pool.set_budget(40 * page)
    seqs.new(100, slot=slots[1])
    seqs.check()
    seqs.end()


# Reuse ------------------------------------------------------------------------------------------


def test_a_follower_uses_what_its_slot_has(pool: vattn.PagePool) -> None:
    cache = make_cache(pool)
    for index, tokens in enumerate((50, 100, 20)):
        slot = cache.open(slot=index)
        cache.ensure(slot, tokens)
        cache.release(slot)
    calls = memory_calls(pool)
    fits = [cache.open(expected_tokens=n) for n in (15, 90, 45)]
    assert [int(slot) for slot in fits] == [2, 1, 0]
    cache.ensure_many(fits, [15, 90, 45])
    assert memory_calls(pool) == calls
    assert cache.stats().pages_adopted > 0
    cache.check()
    cache.close()


def test_a_follow_up_turn_maps_only_what_is_new(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool))
    prefix = seqs.new(60)
    turn = seqs.fork(prefix)
    seqs.grow(turn, 80)
    seqs.release(turn)
    calls = memory_calls(pool)
    again = seqs.fork(prefix)
    assert again == turn
    seqs.grow(again, 80)
    assert memory_calls(pool) == calls
    seqs.check()
    seqs.end()


def test_without_reuse_nothing_stays_mapped(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, reuse_stale=False)
    slot = cache.open()
    cache.ensure(slot, 100)
    cache.release(slot)
    assert cache.stats().stale_bytes == 0
    assert pool.stats().free_bytes == pool.driver.physical_bytes() > 0
    assert_all_given_back(cache)
    cache.close()


@pytest.mark.parametrize("ways", [2, 3])
def test_pages_that_only_free_slots_share_are_reclaimed(driver: _core.Driver, ways: int) -> None:
    pool = make_pool(driver, pages=20)
    seqs = Sequences(make_cache(pool))
    a = seqs.new(99)  # 14 pages, 13 of them full
    children = [seqs.fork(a) for _ in range(ways - 1)]
    for slot in (*children, a):
        seqs.release(slot)
    last = seqs.new(100, slot=3)
    seqs.check()
    seqs.release(last)
    pool.set_budget(pool.page_bytes)
    assert driver.physical_bytes() <= pool.page_bytes
    seqs.cache.check()
    seqs.end()


# Ahead of need ----------------------------------------------------------------------------------


def test_prepare_maps_ahead_in_the_background(pool: vattn.PagePool) -> None:
    seqs = Sequences(make_cache(pool))
    a, b = seqs.new(10), seqs.new(20)
    slots = np.array([a, b], dtype=np.int32)
    ticket = seqs.cache.prepare(slots, np.array([90, 100], dtype=np.int32))
    assert ticket.wait()
    assert ticket.wait(1.0)
    assert ticket.done()
    assert [seqs.cache.tokens(slot) for slot in (a, b)] == [10, 20]
    assert seqs.cache.stats().cover_bytes > 0
    assert seqs.cache.pages_needed(a, 90) == 0 < seqs.cache.pages_needed(a, 100)
    seqs.check()
    calls = memory_calls(pool)
    for tokens in (11, 50, 90):
        seqs.grow(a, tokens)
    assert memory_calls(pool) == calls
    c = seqs.fork(b)
    seqs.grow(c, 30)
    seqs.check()
    seqs.end()


def test_errors_arrive_with_the_ticket(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=4)
    cache = make_cache(pool)
    a = cache.open()
    ticket = cache.prepare([a], [100])
    for _ in range(2):  # each time that somebody asks
        with pytest.raises(vattn.OutOfPages, match="4 can be had"):
            ticket.wait(30.0)
    late = cache.open()
    cache.release(late)
    with pytest.raises(ValueError, match="not open"):
        cache.prepare([int(late)], [1]).wait()
    cache.prepare([a], [20]).wait()
    cache.check()
    cache.close()


def test_pages_are_created_ahead(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=64, ahead_pages=16)
    cache = make_cache(pool, max_seqs=2)
    pool.mapper.drain()
    assert pool.stats().free_bytes == 16 * pool.page_bytes
    slot = cache.open()
    for tokens in range(1, 101):
        cache.ensure(slot, tokens)
        pool.mapper.drain()
        assert pool.stats().free_bytes >= 8 * pool.page_bytes
        pool.check()
    cache.close()


# One pool, several caches -----------------------------------------------------------------------


def test_caches_on_one_pool_take_from_each_other(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=30)
    one = Sequences(make_cache(pool))
    other = Sequences(make_cache(pool, layer_specs(pool, 2, dtype=torch.bfloat16), order="head"))
    for _ in range(3):
        first = [one.new(100), one.new(90)]
        with pytest.raises(vattn.OutOfPages):
            other.cache.ensure(other.open(slot=3), 100)
        other.release(3)
        for slot in first:
            one.release(slot)
        second = [other.new(100) for _ in range(2)]
        for seqs in (one, other):
            seqs.check()
        for slot in second:
            other.release(slot)
    assert one.cache.stats().pages_reclaimed > 0
    assert other.cache.stats().pages_reclaimed > 0
    one.cache.trim()
    one.cache.close()
    other.end()


def test_threads_on_two_caches_of_a_short_pool(driver: _core.Driver) -> None:
    """Every thread gets its pages in the end, from the others' stale ones."""
    pool = make_pool(driver, pages=50)
    caches = [make_cache(pool), make_cache(pool, order="head", layers_per_region=1)]
    errors: list[BaseException] = []

    def work(cache: vattn.KVCache, seed: int) -> None:
        rng = random.Random(seed)
        seqs = Sequences(cache, next_writer=1000 * seed)
        try:
            for _ in range(40):
                slot = seqs.open()
                try:
                    seqs.grow(slot, rng.randrange(1, 101))
                    seqs.check()
                except vattn.OutOfPages:
                    pass
                seqs.release(slot)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(cache, seed))
        for seed, cache in enumerate([*caches, *caches], start=1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    caches[0].check()
    caches[0].trim()
    caches[0].close()
    assert_all_given_back(caches[1])
