"""The memory of `vattn.KVCache`: cover, windows, budgets, reuse of stale pages, shared pools."""

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
    pages_of,
)

if TYPE_CHECKING:
    from vattn import _core
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")


# How much ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layers_per_region", [1, 3])
def test_live_memory_is_the_tokens_and_a_page_per_run(
    pool: vattn.PagePool, order: Order, layers_per_region: int
) -> None:
    cache = make_cache(pool, order=order, layers_per_region=layers_per_region, tile=16)
    rng = random.Random(3)
    slots = [cache.open() for _ in range(4)]
    for _ in range(20):
        slot = rng.choice(slots)
        cache.ensure(slot, rng.randrange(1, 101))
        lengths = [cache.tokens(slot) for slot in slots]
        stats = cache.stats()
        assert stats.tokens == sum(lengths)
        assert stats.token_bytes == sum(lengths) * cache.layout.token_bytes
        assert stats.live_bytes == pages_of(cache, lengths) * pool.page_bytes
        runs = sum(region.runs for region in cache.layout.regions)
        assert stats.live_bytes <= stats.token_bytes + len(slots) * runs * pool.page_bytes
        used = stats.live_bytes + stats.cover_bytes + stats.stale_bytes + stats.scratch_bytes
        assert used == pool.stats().used_bytes
        assert used + stats.pooled_bytes == pool.driver.physical_bytes()
    for slot in slots:
        cache.release(slot)
    assert cache.stats().live_bytes == 0
    assert cache.stats().stale_bytes == pool.stats().stale_bytes > 0
    assert_all_given_back(cache)


def test_the_memory_map_shows_what_pages_are(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, tile=64)
    a = cache.open(slot=0)
    cache.ensure(a, 30)
    b = cache.fork(a, 20)
    c = cache.open(slot=3)
    cache.ensure(c, 64)
    cache.release(c)
    maps = cache.memory_map()
    assert maps.page_bytes == pool.page_bytes
    assert [slot.open for slot in maps.slots] == [True, True, False, False]
    assert [slot.tokens for slot in maps.slots] == [30, 20, 0, 0]
    states = [slot.regions[0][0].tolist() for slot in maps.slots]
    # A page holds 7.1 tokens: 30 tokens are 5 pages, a tile of 64 is 9; the fork shares 2.
    shared, live, cover = vattn.PageState.SHARED, vattn.PageState.LIVE, vattn.PageState.COVER
    assert states[0][:10] == [shared] * 2 + [live] * 3 + [cover] * 4 + [vattn.PageState.UNMAPPED]
    assert states[int(b)][:10] == [shared] * 2 + [live] + [cover] * 6 + [vattn.PageState.UNMAPPED]
    assert states[2] == [vattn.PageState.UNMAPPED] * len(states[2])
    assert states[3][:10] == [vattn.PageState.STALE] * 9 + [vattn.PageState.UNMAPPED]
    assert cache.stats().shared_bytes == 2 * pool.page_bytes
    cache.close()


def test_trim_returns_memory_to_the_device(pool: vattn.PagePool) -> None:
    cache = make_cache(pool)
    a, b = cache.open(), cache.open()
    cache.ensure_many([a, b], [100, 50])
    held = pool.driver.physical_bytes()
    cache.release(a)
    assert pool.driver.physical_bytes() == held
    freed = cache.trim()
    assert freed == pages_of(cache, [100]) * pool.page_bytes
    assert pool.driver.physical_bytes() == held - freed
    assert cache.trim() == 0
    cache.release(b)
    assert_all_given_back(cache)


# Cover ------------------------------------------------------------------------------------------


def read_tiles(cache: vattn.KVCache, slot: vattn.Slot, tile: int) -> list[torch.Tensor]:
    """K and V of whole tiles, as a kernel loads them: in strict mode a hole would fault."""
    tokens = -(-cache.tokens(slot) // tile) * tile
    return [t[int(slot), :tokens].float() for i in range(3) for t in cache.layer(i)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [1, 16, 48, 128])
def test_whole_tiles_are_mapped_and_finite(pool: vattn.PagePool, order: Order, tile: int) -> None:
    cache = make_cache(pool, order=order, tile=(tile, 16))
    assert cache.slot_tokens(0) >= -(-100 // tile) * tile
    slots = [cache.open() for _ in range(2)]
    for tokens in (1, 16, 17, 49, 97, 100):
        for slot in slots:
            cache.ensure(slot, tokens)
            for size in (tile, 16):
                for part in read_tiles(cache, slot, size):
                    assert bool(torch.isfinite(part).all())
                    part.fill_(1e30)
            for layer in range(3):
                for view in cache.view(slot, layer):
                    view.fill_(1e30)  # what a recycled page holds: finite garbage
    for slot in slots:
        cache.truncate(slot, 1)
    assert_tiles_finite(cache, slots, tile)


def assert_tiles_finite(cache: vattn.KVCache, slots: list[vattn.Slot], tile: int) -> None:
    for slot in slots:
        for part in read_tiles(cache, slot, tile):
            assert bool(torch.isfinite(part).all())


def spoil(cache: vattn.KVCache, slot: vattn.Slot) -> None:
    for layer in range(len(cache.specs)):
        for view in cache.view(slot, layer):
            view.fill_(float("nan"))
    cache.mark_dirty(slot)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", ["same slot", "other slot", "fork", "assign", "window"])
def test_nan_of_an_ended_sequence_reaches_nobody(
    driver: _core.Driver, order: Order, way: str
) -> None:
    tile = 64
    specs = layer_specs(pool := make_pool(driver), 3, window=8 if way == "window" else None)
    cache = make_cache(pool, specs, order=order, tile=tile, max_tokens=128)
    bad = cache.open(slot=0)
    for tokens in (3, 100, 110):
        cache.ensure(bad, tokens)
        spoil(cache, bad)
    if way == "window":  # what left the window is recycled to the front, NaN and all
        for tokens in range(111, 129):
            cache.ensure(bad, tokens)
    good = cache.open(slot=1)
    cache.ensure(good, 70)
    for layer in range(3):
        for view in cache.view(good, layer):
            view.fill_(2.0)
    if way == "assign":
        other = cache.open(slot=2)
        cache.ensure(other, 3)
        cache.truncate(bad, 3)
        cache.assign([bad, other], [good, good])
        assert_tiles_finite(cache, [good, bad, other], tile)
        cache.truncate(good, 20)
        cache.ensure(good, 128)
        assert_tiles_finite(cache, [good, bad, other], tile)
        cache.close()
        return
    cache.release(bad)
    if way == "other slot":
        cache.trim()
    if way == "fork":
        slots = [good, *(cache.fork(good, n) for n in (1, 30, 70))]
    else:
        slots = [cache.open(slot=2 if way == "other slot" else 0)]
    for tokens in (71, 100, 128):
        for slot in slots:
            cache.ensure(slot, tokens)
            for layer in range(3):
                for view in cache.view(slot, layer):
                    view[-1] = 2.0
        tail = [slot for slot in slots if way == "fork"]
        assert_tiles_finite(cache, tail or slots, tile)
    cache.close()


def test_nan_is_inherited_and_cleaned_with_what_holds_it(pool: vattn.PagePool) -> None:
    """Tails that a fork or an assign copied from a dirty sequence are dirty, too."""
    cache = make_cache(pool, tile=64)
    a = cache.open(slot=0)
    cache.ensure(a, 3)
    spoil(cache, a)
    b = cache.fork(a)
    c = cache.open()
    cache.ensure(c, 5)
    cache.assign([c], [a])
    for slot in (a, b, c):
        index = int(slot)
        assert bool(torch.isnan(cache.view(slot, 0)[0]).all())
        cache.release(slot)
        again = cache.open(slot=index)
        cache.ensure(again, 1)
        assert_tiles_finite(cache, [again], 64)
    cache.close()


def test_a_dirty_sequence_may_go_back_and_on(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, tile=64)
    a = cache.open()
    cache.ensure(a, 40)
    for layer in range(3):
        for view in cache.view(a, layer):
            view.fill_(1.0)
            view[20:].fill_(float("nan"))
    cache.mark_dirty(a)
    cache.truncate(a, 20)
    cache.ensure(a, 21)
    for layer in range(3):
        for view in cache.view(a, layer):
            assert bool((view[:20] == 1).all())
    assert_tiles_finite(cache, [a], 64)
    cache.close()


# Windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [1, 16])
def test_a_window_layer_recycles_its_pages(pool: vattn.PagePool, order: Order, tile: int) -> None:
    window = 40
    specs = layer_specs(pool, 2, window=window)
    cache = make_cache(pool, specs, order=order, max_tokens=2000, tile=tile)
    a = cache.open()
    created = 0
    for tokens in range(1, 2001):
        cache.ensure(a, tokens)
        for layer in range(2):
            for view in cache.view(a, layer):
                view[-1] = tokens
        # What the step's one query can see, from the tile on that this begins in.
        assert cache.first_token(a, 0) <= max(0, tokens - window) // tile * tile
        if tokens == 500:
            created = pool.stats().created_bytes
    runs = sum(region.runs for region in cache.layout.regions)
    # The window, the tile that it begins in and the one that it ends in, and the pages they cut.
    held = pages_of(cache, [window + 2 * tile]) + 2 * runs
    assert cache.stats().live_bytes + cache.stats().cover_bytes <= held * pool.page_bytes
    assert pool.stats().created_bytes <= max(created, held * pool.page_bytes)
    assert cache.stats().pages_recycled > 0
    first = cache.first_token(a, 0)
    assert 2000 - window - tile - 2 * pool.page_bytes <= first <= 2000 - window
    for view in cache.view(a, 1):
        assert view[:, 0, 0].tolist() == [*range(first + 1, 2001)]
    del view
    cache.release(a)
    assert_all_given_back(cache)


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
