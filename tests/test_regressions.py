"""Mistakes that were made once: each test failed before its mistake was mended."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import vattn
from tests.drivers import make_driver
from tests.fake_cuda.fake import FakeCuda
from tests.helpers import SMALL_PAGE

PAGE = 4096


def small_cache(slots: int, pages: int, **settings: object) -> vattn.KVCache:
    """One layer of one head, head order: two runs, 16 tokens a page."""
    return vattn.KVCache(
        1,
        1,
        64,
        torch.float32,
        max_seqs=slots,
        max_tokens=4096,
        page_bytes=PAGE,
        budget_bytes=pages * PAGE,
        strict=True,
        **settings,  # type: ignore[arg-type]
    )


def test_batch_fence_covers_what_each_slot_waited_for(fake_cuda: FakeCuda) -> None:
    """A windowed slot first in a batch, then one whose pages another stream still reads."""
    fake_cuda.configure(granularity=SMALL_PAGE)
    driver = make_driver("cuda_fake")
    pool = vattn.PagePool(driver=driver, page_bytes=SMALL_PAGE, budget_bytes=400 * SMALL_PAGE)
    dim = SMALL_PAGE // 4 // 2 // 32  # 32 tokens a page in token order
    specs = [vattn.LayerSpec(1, dim, torch.float32, window) for window in (32, None)]
    one, two = driver.create_stream(), driver.create_stream()
    with vattn.KVCache(specs, max_seqs=4, max_tokens=1024, pool=pool, order="token") as cache:
        windowed, adopted = cache.open(slot=0), cache.open(slot=1)
        cache.ensure(windowed, 320, stream=two)
        cache.ensure(adopted, 640, stream=one)
        fake_cuda.hold(one)
        fake_cuda.launch(one, [(cache._slots.address(1, 1), 20 * SMALL_PAGE)])
        cache.release(adopted, stream=one)
        cache.open(slot=1)
        cache.ensure_many([0, 1], [640, 32], stream=two)
        trim = threading.Thread(target=cache.trim)
        trim.start()
        trim.join(0.3)
        assert fake_cuda.violations() == []
        fake_cuda.release(one)
        trim.join()
        cache.check()
    for stream in (one, two):
        driver.synchronize(stream)
        driver.destroy_stream(stream)


def test_window_recycles_within_a_tight_budget() -> None:
    """Entries that a widened window still lacked were taken off the count of stale pages."""
    cache = small_cache(1, 12, window=64)
    seq = cache.open()
    for tokens in range(1, 2000):
        cache.ensure(seq, tokens)
    cache.check()
    assert cache.pool.stats().peak_created_bytes <= 12 * PAGE


def test_fork_reclaims_what_its_own_slot_has_left() -> None:
    cache = small_cache(2, 11 * 2 + 5 * 2)
    a, b = cache.open(), cache.open()
    cache.ensure(b, 80)
    cache.ensure(a, 168)
    cache.release(b)
    cache.fork(a)
    cache.check()


def test_idle_scratch_is_given_up() -> None:
    pool = vattn.PagePool(page_bytes=PAGE, budget_bytes=40 * PAGE)
    specs = [vattn.LayerSpec(1, 64, torch.float32)] * 4
    reordering = vattn.KVCache(specs, max_seqs=2, max_tokens=64, pool=pool)
    rows = [reordering.open(), reordering.open()]
    reordering.ensure_many(rows, [15, 15])
    reordering.assign(rows, rows[::-1])
    assert reordering.stats().scratch_bytes > 0
    for row in rows:
        reordering.release(row)
    other = vattn.KVCache(specs, max_seqs=1, max_tokens=4096, pool=pool)
    other.ensure(other.open(), 80)  # all 40 pages
    for cache in (reordering, other):
        cache.check()


def test_default_budget_has_room_for_reorders() -> None:
    cache = vattn.KVCache(1, 1, 64, torch.float32, max_seqs=3, max_tokens=127)
    rows = [cache.open() for _ in range(3)]
    cache.ensure_many(rows, [126] * 3)
    cache.assign(rows[:2], [rows[1], rows[0]])
    cache.assign(rows, [rows[1], rows[2], rows[0]])
    cache.check()


def test_nothing_new_beyond_a_lowered_budget() -> None:
    cache = small_cache(3, 40)
    a, b = cache.open(), cache.open()
    cache.ensure_many([a, b], [160, 160])
    cache.pool.set_budget(10 * PAGE)
    assert cache.pool.stats().created_bytes == 40 * PAGE  # live sequences keep theirs
    cache.truncate(b, 0)
    assert cache.pool.stats().created_bytes == 20 * PAGE
    with pytest.raises(vattn.OutOfPages):
        cache.ensure(a, 320)
    cache.check()


@pytest.mark.skipif(
    int(Path("/proc/sys/vm/max_map_count").read_text()) > 100_000,
    reason="vm.max_map_count is set so high here that meeting it would take gigabytes",
)
def test_mappings_that_run_out_are_taken_from_stale_slots() -> None:
    """vm.max_map_count is the process's, and whatever is stale in any cache gives way."""
    specs = [vattn.LayerSpec(16, 8, torch.float32)] * 32  # 1024 runs a slot
    pool = vattn.PagePool(page_bytes=PAGE, budget_bytes="2GiB")
    first = vattn.KVCache(specs, max_seqs=60, max_tokens=256, pool=pool)
    opened = [first.open() for _ in range(60)]
    with pytest.raises(vattn.OutOfPages, match="max_map_count"):
        first.ensure_many(opened, [1] * 60)
    for seq in opened:
        first.release(seq)
    second = vattn.KVCache(specs, max_seqs=1, max_tokens=256, pool=pool)
    second.ensure(second.open(), 1)
    for cache in (first, second):
        cache.close()
    pool.check()


def test_lengths_are_read_once() -> None:
    """Another thread may write to the arrays of a call that runs without the GIL."""
    cache = small_cache(64, 4096)
    slots = np.array([int(cache.open()) for _ in range(64)], dtype=np.int32)
    lengths = np.full(64, 8, dtype=np.int32)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            lengths[:] = 2**30
            lengths[:] = 8

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(300):
            try:
                cache.ensure_many(slots, lengths)
            except ValueError as error:
                assert "max_tokens" in str(error)
    finally:
        stop.set()
        thread.join()
    cache.check()


@pytest.mark.parametrize("keep", [False, True])
def test_a_release_survives_an_event_that_cannot_be_recorded(
    fake_cuda: FakeCuda, keep: bool
) -> None:
    """It waits for the stream instead; the slot used to stay open, and nobody could end it."""
    fake_cuda.configure(granularity=SMALL_PAGE)
    driver = make_driver("cuda_fake")
    pool = vattn.PagePool(driver=driver, page_bytes=SMALL_PAGE, budget_bytes=40 * SMALL_PAGE)
    with vattn.KVCache(1, 1, 64, torch.float32, max_seqs=2, max_tokens=256, pool=pool) as cache:
        slot = cache.open()
        cache.ensure(slot, 100)
        fake_cuda.fail("cuEventRecord", nth=1, code=2)
        cache.truncate(slot, 60)
        fake_cuda.fail("cuEventRecord", nth=1, code=2)
        cache.release(slot, keep=keep)
        cache.check()
        assert cache.stats().open_slots == 0
        assert cache.kept(int(slot))[1] == (60 if keep else 0)


def test_a_dirty_sequence_leaves_nothing_mapped() -> None:
    """A kernel may read a slot beyond its sequence where holes read as zeros: not NaN, then."""
    cache = vattn.KVCache(
        1, 1, 64, torch.float32, max_seqs=3, max_tokens=256, page_bytes=PAGE, order="head"
    )
    assert cache.holes_readable
    with cache:
        k, v = cache.layer(0)
        for keep in (False, True):
            slot = cache.open(slot=0)
            cache.ensure(slot, 200)
            k[0, :200] = v[0, :200] = float("nan")
            cache.mark_dirty(slot)
            twin = cache.fork(slot, 150)
            cache.release(slot, keep=keep)
            index = int(twin)
            cache.release(twin)
            for again in (0, index):
                short = cache.open(slot=again)
                cache.ensure(short, 8)
                k[again, :8] = v[again, :8] = 1.0
                assert torch.isfinite(k[again, :256]).all()
                assert torch.isfinite(v[again, :256]).all()
                cache.check()
                cache.release(short)
