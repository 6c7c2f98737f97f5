"""The memory of `vattn.KVCache`: how much, cover, what recycled pages hold, windows.

Budgets and reuse are in test_kv_pool.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

import vattn
from tests.helpers import assert_all_given_back, layer_specs, make_cache, make_pool, pages_of

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
