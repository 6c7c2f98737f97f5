"""Pages that go from one sequence to the next where they are, as maps of a cache show them."""

from __future__ import annotations

import numpy as np
import pytest

import vattn
from tests.helpers import make_cache, memory_calls
from vattn.kv.report import PageState

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

RECYCLED = 0x80


def recycled_pages(cache: vattn.KVCache, slot: int) -> int:
    """How many there are; each is in use."""
    found = cache.memory_map().slots[slot]
    for marks, states in zip(found.recycled, found.regions, strict=True):
        assert marks.shape == states.shape
        in_use = (PageState.LIVE, PageState.SHARED, PageState.COVER)
        assert np.isin(states[marks], in_use).all()
    return sum(int(marks.sum()) for marks in found.recycled)


def mapped_pages(cache: vattn.KVCache, slot: int) -> int:
    return sum(int((states > 0).sum()) for states in cache.memory_map().slots[slot].regions)


def test_pages_that_were_mapped_before_are_recycled(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, max_seqs=1)
    first = cache.open()
    cache.ensure(first, 40)
    few = mapped_pages(cache, 0)
    assert recycled_pages(cache, 0) == 0  # all of them fresh
    cache.release(first)
    assert recycled_pages(cache, 0) == 0  # stale, in nobody's use
    calls = memory_calls(pool)
    second = cache.open()
    cache.ensure(second, 40)
    assert memory_calls(pool) == calls
    assert recycled_pages(cache, 0) == few
    cache.check()
    cache.ensure(second, 100)
    assert mapped_pages(cache, 0) > few
    assert recycled_pages(cache, 0) == few  # what it grew by is fresh
    cache.check()
    cache.release(second)
    cache.trim()
    third = cache.open()
    cache.ensure(third, 40)
    assert recycled_pages(cache, 0) == 0  # mapped anew
    cache.check()
    cache.release(third)


def test_an_overview_is_of_the_slots_with_anything_mapped(pool: vattn.PagePool) -> None:
    cache = make_cache(pool, max_seqs=3)
    assert cache.overview(8) == []
    slot = cache.open()
    cache.ensure(slot, 100)
    ((index, tokens, kept, cells),) = cache.overview(5)
    assert (index, tokens, kept) == (int(slot), 100, 0)
    assert len(cells) == 5
    assert cells[:3] == bytes([PageState.LIVE] * 3)  # a slot has room for some more
    cache.release(slot)
    ((_, tokens, _, cells),) = cache.overview(5)
    assert (tokens, cells[:3]) == (0, bytes([PageState.STALE] * 3))
    again = cache.open()
    cache.ensure(again, 1)
    ((_, _, _, cells),) = cache.overview(5)
    assert cells[0] == PageState.LIVE | RECYCLED
    assert cells[2] == PageState.STALE
    fork = cache.fork(again, 1)
    cache.release(fork)
    cache.release(again)
    cache.check()
    with pytest.raises(ValueError, match="cells=0"):
        cache.overview(0)
