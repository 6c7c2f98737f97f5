"""Kept slots: what a free slot remembers, and who may continue from it; see test_kept_eviction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import vattn
from tests.helpers import (
    layer_specs,
    make_cache,
    memory_calls,
    pages_of,
)
from tests.kept import KeptSequences
from vattn import PagesGone, PageState
from vattn.cli.memory_map import render

if TYPE_CHECKING:
    from collections.abc import Callable

    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")


# Continuing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 43, 57, 90])
@pytest.mark.parametrize("tile", [1, 16])
def test_a_slot_is_reopened_in_place(
    pool: vattn.PagePool, order: Order, tokens: int, tile: int
) -> None:
    seqs = KeptSequences(make_cache(pool, order=order, tile=tile))
    a = seqs.new(90)
    seqs.keep(a)
    assert seqs.cache.kept(a) == (0, 90)
    seqs.check()
    calls = memory_calls(pool)
    assert seqs.reopen(a, tokens) == a
    assert seqs.cache.kept(a) == (0, 0)
    seqs.check("reopened")
    seqs.grow(a, tokens)
    seqs.check("its cover is there")
    seqs.grow(a, 90)
    assert memory_calls(pool) == calls
    seqs.check("grown over what it had")
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 43, 57, 90])
def test_a_slot_is_forked_and_stays_kept(pool: vattn.PagePool, order: Order, tokens: int) -> None:
    seqs = KeptSequences(make_cache(pool, order=order))
    a = seqs.new(90)
    seqs.keep(a)
    b, c = seqs.fork(a, tokens), seqs.fork(a, tokens)
    assert seqs.cache.kept(a) == (0, 90)
    seqs.check("forked")
    for slot in (b, c):
        seqs.grow(slot, 100)
    seqs.check("grown")
    seqs.release(b)
    seqs.reopen(a, 90)
    seqs.check("and the source is what it was")
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cut", [1, 7, 8, 42, 43, 50, 89])
def test_what_a_kept_slot_shares_is_not_written(
    pool: vattn.PagePool, order: Order, cut: int
) -> None:
    """Either side goes back into pages that the other still wants, and writes there."""
    for writer in (0, 1):
        seqs = KeptSequences(make_cache(pool, order=order))
        pair = [seqs.new(90)]
        pair.append(seqs.fork(pair[0]))
        seqs.keep(pair[1 - writer])
        seqs.truncate(pair[writer], cut)
        seqs.grow(pair[writer], 95)
        seqs.check("cut and grown")
        seqs.keep(pair[writer])
        for slot in pair:
            seqs.reopen(slot, len(seqs.kept[slot]))
        seqs.check("both reopened")
        seqs.keep(pair[0])
        seqs.keep(pair[1])
        seqs.reopen(pair[writer], cut)
        seqs.grow(pair[writer], 100)
        seqs.reopen(pair[1 - writer], 90)
        seqs.check("reopened, shorter, and grown")
        seqs.end()


def test_stale_pages_that_another_slot_keeps_are_not_adopted(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    a = seqs.new(90)
    b = seqs.fork(a)
    seqs.release(b)  # its mappings of the pages of `a` are stale
    seqs.keep(a)
    b = seqs.open(slot=b)
    for tokens in (1, 30, 90):
        seqs.grow(b, tokens)
        seqs.check(tokens)
    seqs.assign([b], [seqs.new(45)])
    seqs.reopen(a, 90)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [1, 16])
def test_windows_of_kept_slots(pool: vattn.PagePool, order: Order, tile: int) -> None:
    """Every length from `lowest` on can be had, with what its next query reaches; no other."""
    window, specs = 16, layer_specs(pool, 2, kv_heads=2, window=16) + layer_specs(pool, 1)
    cache = make_cache(pool, specs, order=order, max_tokens=400, tile=tile)
    seqs = KeptSequences(cache)
    a = seqs.new(40)
    for tokens in range(41, 300):
        seqs.grow(a, tokens)
    seqs.keep(a)
    lowest, kept = cache.kept(a)
    assert (kept, 0 < lowest <= 298) == (299, True)
    for tokens in {lowest, lowest + 1, (lowest + 299) // 2, 299}:
        b = seqs.fork(a, tokens)
        assert cache.first_token(b, 0) <= max(0, tokens - window)
        seqs.grow(b, tokens + 30)
        seqs.check(tokens)
        seqs.release(b)
    for act in (cache.reopen, cache.fork):
        with pytest.raises(PagesGone, match=f"lengths of {lowest} to 299 tokens"):
            act(a, lowest - 1)
    seqs.reopen(a, lowest)
    assert cache.first_token(a, 0) <= lowest - window
    seqs.check()
    seqs.keep(a)
    assert cache.kept(a) == (lowest, lowest)
    seqs.end()


def test_a_follow_up_turn_calls_nothing(pool: vattn.PagePool) -> None:
    """Released and reopened, again and again: pages are mapped for new tokens only."""
    seqs = KeptSequences(make_cache(pool, max_tokens=400))
    a = seqs.new(30)
    mapped = seqs.cache.stats().pages_mapped
    for _ in range(20):
        before = len(seqs.writers[a])
        seqs.keep(a)
        calls = memory_calls(pool)
        seqs.reopen(a, before)
        seqs.cache.ensure(a, before)
        assert memory_calls(pool) == calls
        seqs.grow(a, before + 13)
    assert seqs.cache.stats().pages_mapped - mapped == pages_of(seqs.cache, [290]) - pages_of(
        seqs.cache, [30]
    )
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_kept_sequence_may_hold_nan(pool: vattn.PagePool, order: Order) -> None:
    """Its tokens stay as they are; what a kernel reads beyond them is finite."""
    cache = make_cache(pool, order=order, tile=16)
    a = cache.open()
    cache.ensure(a, 90)
    for layer in range(3):
        for view in cache.view(a, layer):
            view[:] = torch.nan
    cache.mark_dirty(a)
    cache.release(a, keep=True)
    for slot in (cache.fork(int(a), 21), cache.reopen(int(a), 21)):
        cache.ensure(slot, 22)
        for layer in range(3):
            for tensor in cache.layer(layer):
                tile = tensor[int(slot), :32].cpu()
                assert bool(tile[:21].isnan().all())
                assert bool(tile[21:].isfinite().all())
    cache.check()
    cache.close()


# Page counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_page_counts_are_what_is_used_up(pool: vattn.PagePool, order: Order) -> None:
    cache = make_cache(pool, order=order, max_seqs=8)
    seqs = KeptSequences(cache)
    available = pool.core.available_pages
    runs = sum(region.runs for region in cache.layout.regions)

    def uses(act: Callable[[], object]) -> int:
        before = available()
        act()
        return before - available()

    assert cache.admission_pages(90) == pages_of(cache, [90])
    assert uses(lambda: seqs.new(90)) == pages_of(cache, [90])
    a = 0
    need = cache.admission_pages(95, source=a, shared_tokens=70)
    assert need == uses(lambda: seqs.grow(seqs.fork(a, 70), 95)) < pages_of(cache, [95])
    c = seqs.new(95)
    need = cache.pages_needed_many(np.array([a, c], np.int32), np.array([100, 100], np.int32))
    assert need == uses(lambda: cache.ensure_many([a, c], [100, 100]))
    seqs.write(a)
    seqs.write(c)
    seqs.keep(c)
    need = cache.admission_pages(100, source=c, shared_tokens=70)
    used = uses(lambda: seqs.grow(seqs.fork(c, 70), 100))
    assert used <= need <= used + runs  # the tail is there till it is copied
    need = cache.admission_pages(100, source=c, shared_tokens=60, in_place=True)
    used = uses(lambda: seqs.grow(seqs.reopen(c, 60), 100))
    assert used <= need <= used + runs
    d = seqs.new(90)
    seqs.truncate(d, 5)
    assert cache.pages_needed(d, 90) == 0 < cache.pages_needed_many([d], [90])
    assert cache.pages_needed_many([d], [90]) == uses(lambda: seqs.grow(d, 90))
    seqs.check()
    seqs.end()


# Misuse, reports --------------------------------------------------------------------------------


def test_what_is_no_kept_slot_is_refused(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    cache = seqs.cache
    a, b = seqs.new(50), seqs.new(10)
    gone = cache.open()
    seqs.keep(a)
    cache.release(gone)
    calls: list[Callable[[Any], object]] = [
        cache.forget,
        cache.touch,
        lambda slot: cache.reopen(slot, 5),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"slot {b} is open"):
            call(b)
        for index in (-1, 4, 2**31 - 1):
            with pytest.raises(ValueError, match=rf"slot {index} is not one of the 4 slots"):
                call(index)
        with pytest.raises(TypeError):
            call(None)
    for act in (cache.reopen, cache.fork):
        with pytest.raises(
            ValueError, match=r"is not open \(released already\?\) and was not kept"
        ):
            act(int(gone), 5)
        for tokens in (-1, 2**31):
            with pytest.raises(ValueError, match=f"tokens={tokens} must not be negative"):
                act(a, tokens)
        with pytest.raises(PagesGone, match="lengths of 0 to 50 tokens, not its first 51 tokens"):
            act(a, 51)
    assert issubclass(PagesGone, LookupError)
    wrongs: list[dict[str, Any]] = [
        {"tokens": 101},
        {"tokens": 20, "source": a, "shared_tokens": 21},
        {"tokens": 20, "shared_tokens": 5},
        {"tokens": 20, "anchor": 21},
        {"tokens": 20, "source": b, "shared_tokens": 5, "in_place": True},
        {"tokens": 20, "source": b, "shared_tokens": 11},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"tokens|only a free slot"):
            cache.admission_pages(**wrong)
    with pytest.raises(PagesGone):
        cache.admission_pages(60, source=a, shared_tokens=51)
    handle = cache.reopen(a, 20)
    assert (int(handle), cache.tokens(handle)) == (a, 20)
    seqs.writers[a] = seqs.kept.pop(a)[:20]
    seqs.check()
    seqs.end()


def test_without_stale_pages_nothing_is_kept(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool, reuse_stale=False))
    a = seqs.new(50)
    with pytest.raises(ValueError, match="reuse_stale=False keeps nothing"):
        seqs.cache.release(a, keep=True)
    seqs.check()
    seqs.end()


def test_keeping_nothing(pool: vattn.PagePool) -> None:
    cache = make_cache(pool)
    slot = int(cache.open())
    cache.prepare([slot], [50]).wait()
    cache.release(slot, keep=True)
    assert cache.kept(slot) == (0, 0)
    cache.check()
    with pytest.raises(PagesGone):
        cache.reopen(slot, 0)
    cache.close()


def test_reports_show_what_is_kept(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, tile=16)
    seqs = KeptSequences(cache)
    a, b = seqs.new(50), seqs.new(50)
    c = seqs.fork(a, 30)
    seqs.keep(a)
    seqs.release(b)
    stats = cache.stats()
    page, token = pool.page_bytes, cache.layout.regions[0].token_bytes
    assert (stats.kept_slots, stats.open_slots) == (1, 1)
    shared = 30 * token // page
    assert stats.kept_bytes == (-(-50 * token // page) - shared) * page
    assert stats.kept_bytes < stats.stale_bytes == pool.stats().stale_bytes
    memory = cache.memory_map()
    kept = memory.slots[a]
    assert (kept.open, kept.tokens, kept.kept) == (False, 0, 50)
    (row,) = kept.regions[0].tolist()
    n = -(-50 * token // page)
    assert row[:n] == [PageState.KEPT] * n
    assert PageState.KEPT not in row[n:]
    text = render(memory, width=80, plain_ascii=True).plain.splitlines()
    assert text[a].endswith("50 kept")
    assert "ooo" in text[a]
    assert "o kept" in text[-1]
    assert cache.kept_lengths().dtype == np.int32
    assert cache.kept_lengths().tolist() == [[0, 50] if i == a else [0, 0] for i in range(4)]
    seqs.release(c)
    seqs.end()
