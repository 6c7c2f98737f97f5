"""Sequences that are saved in host memory, and what they are when they come back."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vattn
from tests.fake_cuda.driver import Driver as FakeDriver
from tests.fake_cuda.fake import StreamMode
from tests.helpers import layer_specs, make_cache, make_pool, memory_calls, slot_ranges
from tests.kept import KeptSequences
from tests.test_stream_order import Device
from vattn import OutOfPages

if TYPE_CHECKING:
    from tests.fake_cuda.fake import FakeCuda
    from vattn import _core
    from vattn.kv.layout import Order

pytest_plugins = ("tests.cache_fixtures",)
pytestmark = pytest.mark.usefixtures("small_pages")

ORDERS: tuple[Order, ...] = ("token", "head")
WINDOW = 16


def save(seqs: KeptSequences, slot: int) -> tuple[torch.Tensor, int, list[int]]:
    """What the sequence is, in host memory and on record."""
    buffer = torch.full((seqs.cache.saved_bytes(slot),), 0xAB, dtype=torch.uint8)
    seqs.cache.save(slot, buffer)
    seqs.cache.pool.driver.synchronize()
    return buffer, seqs.cache.anchor(slot), list(seqs.writers[slot])


def restore(
    seqs: KeptSequences, slot: int, saved: tuple[torch.Tensor, int, list[int]], first: int = 0
) -> None:
    buffer, anchor, writers = saved
    seqs.cache.restore(slot, len(writers), anchor, buffer, first)
    seqs.cache.pool.driver.synchronize()
    seqs.writers[slot] = list(writers)
    seqs.check("restored")


def windowed(pool: vattn.PagePool, order: Order, tile: int = 1) -> KeptSequences:
    """A cache with layers that see all, and layers that see a window."""
    specs = layer_specs(pool, 2, kv_heads=2, window=WINDOW) + layer_specs(pool, 1)
    return KeptSequences(make_cache(pool, specs, order=order, max_tokens=400, tile=tile))


def decode(seqs: KeptSequences, slot: int, last: int, step: int = 1) -> None:
    for tokens in range(len(seqs.writers[slot]) + 1, last + 1, step):
        seqs.grow(slot, tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 43, 90])
@pytest.mark.parametrize("tile", [1, 16])
def test_a_sequence_goes_and_comes_back(
    pool: vattn.PagePool, order: Order, tokens: int, tile: int
) -> None:
    seqs = KeptSequences(make_cache(pool, order=order, tile=tile))
    a = seqs.new(tokens)
    saved = save(seqs, a)
    seqs.release(a)
    other = seqs.new(100)  # in its pages
    b = seqs.open()
    restore(seqs, b, saved)
    assert seqs.cache.tokens(b) == tokens
    seqs.grow(b, min(100, tokens + 9))
    seqs.check()
    seqs.release(other)
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
def test_whole_pages_are_saved_region_by_region_run_by_run(
    pool: vattn.PagePool, order: Order
) -> None:
    """And in one copy where addresses go on."""
    seqs = windowed(pool, order)
    cache, page = seqs.cache, pool.page_bytes
    a = seqs.new(40)
    decode(seqs, a, 90)
    anchor = cache.anchor(a)
    assert anchor == 89
    copies = pool.driver_calls()["copy"]
    saved = save(seqs, a)
    runs = sum(region.runs for region in cache.layout.regions)
    assert pool.driver_calls()["copy"] == copies + runs
    at = 0
    for index, region in enumerate(cache.layout.regions):
        window = region.spec.window
        low = (max(0, anchor - window) if window else 0) * region.token_bytes // page * page
        high = -(-90 * region.token_bytes // page) * page
        base = cache._slots.address(a, index)
        for run in range(region.runs):
            expected = _bytes(pool, base + run * region.run_bytes + low, high - low)
            assert saved[0][at : at + high - low].numpy().tobytes() == expected
            at += high - low
    assert at == len(saved[0]) == cache.saved_bytes(a)
    seqs.end()


def _bytes(pool: vattn.PagePool, address: int, size: int) -> bytes:
    back = ctypes.create_string_buffer(size)
    pool.driver.copy_to_host(ctypes.addressof(back), address, size)
    pool.driver.synchronize()
    return back.raw


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("step", [1, 7, 60])
def test_a_window_is_mapped_and_nothing_below(
    pool: vattn.PagePool, order: Order, tile: int, step: int
) -> None:
    seqs = windowed(pool, order, tile)
    cache = seqs.cache
    a = seqs.new(40)
    decode(seqs, a, 300, step)
    live, first = cache.stats().live_bytes, cache.first_token(a, 0)
    saved = save(seqs, a)
    seqs.release(a)
    cache.trim()
    b = seqs.open()
    need = cache.admission_pages(len(saved[2]), anchor=saved[1])
    available = pool.core.available_pages()
    restore(seqs, b, saved)
    assert available - pool.core.available_pages() == need
    assert cache.stats().live_bytes <= live
    assert cache.anchor(b) == saved[1]
    assert first <= cache.first_token(b, 0) <= max(0, saved[1] - WINDOW)
    assert cache.first_token(b, 2) == 0
    decode(seqs, b, 330)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shared", [1, 8, 50, 86, 90])
def test_only_what_is_missing_comes_back(
    pool: vattn.PagePool, order: Order, in_place: bool, shared: int
) -> None:
    """Into a slot that has the beginning: what it shares is neither copied nor written."""
    seqs = KeptSequences(make_cache(pool, order=order))
    a = seqs.new(90)
    saved = save(seqs, a)
    seqs.keep(a)
    holder = seqs.fork(a, 90)
    copied = seqs.cache.stats().copied_bytes
    b = seqs.reopen(a, shared) if in_place else seqs.fork(a, shared)
    token_bytes = seqs.cache.layout.token_bytes
    runs = sum(region.runs for region in seqs.cache.layout.regions)
    restore(seqs, b, saved, shared)
    more = seqs.cache.stats().copied_bytes - copied - (90 - shared) * token_bytes
    assert 0 <= more <= runs * pool.page_bytes  # the shared tail
    seqs.grow(b, 100)
    seqs.grow(holder, 95)
    seqs.check()
    seqs.end()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("total", [48, 60, 130, 300])
def test_a_window_far_from_the_shared_beginning(
    pool: vattn.PagePool, order: Order, total: int
) -> None:
    """Between the two nothing is mapped, and what the beginning had is left behind."""
    seqs = windowed(pool, order)
    cache = seqs.cache
    a = seqs.new(40)
    seqs.keep(a)
    for _ in range(2):  # the second time with pages that the first left
        b = seqs.fork(a, 40)
        decode(seqs, b, total)
        used = cache.stats().live_bytes
        saved = save(seqs, b)
        seqs.release(b)
        c = seqs.fork(a, 38)
        restore(seqs, c, saved, 38)
        assert cache.anchor(c) == saved[1]
        assert cache.stats().live_bytes <= used
        assert cache.first_token(c, 0) <= total - WINDOW
        seqs.keep(c)
        lowest, kept = cache.kept(c)
        assert (lowest <= saved[1], kept) == (True, total)
        seqs.reopen(c, lowest)
        seqs.grow(c, lowest + 5)
        seqs.check()
        seqs.release(c)
    seqs.end()


def test_without_pages_nothing_comes_back(driver: _core.Driver) -> None:
    pool = make_pool(driver, pages=19)
    seqs = KeptSequences(make_cache(pool))
    a = seqs.new(90)
    saved = save(seqs, a)
    seqs.keep(a)
    b = seqs.fork(a, 50)
    c = seqs.new(45)
    for first in (0, 50):
        with pytest.raises(OutOfPages):
            seqs.cache.restore(b, 90, saved[1], saved[0], first)
        seqs.check(first)
    seqs.release(c)
    restore(seqs, b, saved, 50)
    seqs.end()


def test_a_swap_makes_no_memory_call_where_pages_are_left(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    a = seqs.new(90)
    saved = save(seqs, a)
    seqs.release(a)
    calls = memory_calls(pool)
    b = seqs.open(expected_tokens=90)
    assert b == a
    restore(seqs, b, saved)
    assert memory_calls(pool) == calls
    seqs.end()


def test_what_does_not_go_together_is_refused(pool: vattn.PagePool) -> None:
    seqs = KeptSequences(make_cache(pool))
    cache = seqs.cache
    a = seqs.new(50)
    buffer, anchor, _ = save(seqs, a)
    size = len(buffer)
    b = seqs.fork(a, 30)
    for wrong in (size - 1, size + pool.page_bytes):
        other = torch.zeros(wrong, dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"is saved in {size} bytes, not in {wrong}"):
            cache.save(a, other)
        with pytest.raises(ValueError, match=f"is saved in {size} bytes, not in {wrong}"):
            cache.restore(b, 50, anchor, other)
    buffers: list[Any] = [buffer.view(torch.int32), torch.zeros(2 * size, dtype=torch.uint8)[::2]]
    for wrong_buffer in buffers:
        with pytest.raises(ValueError, match="give a contiguous uint8 tensor on the CPU"):
            cache.save(a, wrong_buffer)
        with pytest.raises(ValueError, match="give a contiguous uint8 tensor on the CPU"):
            cache.restore(b, 50, anchor, wrong_buffer)
    for tokens, at, first in ((50, anchor, 31), (20, 0, 0), (50, 51, 0)):
        with pytest.raises(ValueError, match="slot 1 holds 30 tokens and cannot be given tokens"):
            cache.restore(b, tokens, at, buffer, first)
    with pytest.raises(ValueError, match="reserved per sequence"):
        cache.restore(b, 101, anchor, buffer)
    for call in (cache.anchor, cache.saved_bytes, lambda slot: cache.save(slot, buffer)):
        with pytest.raises(ValueError, match="slot 3 is not open"):
            call(3)
    with pytest.raises(ValueError, match="slot 3 is not open"):
        cache.restore(3, 50, anchor, buffer)
    seqs.check()
    seqs.end()


def test_a_save_comes_after_the_last_kernel_of_a_reopened_slot(fake_cuda: FakeCuda) -> None:
    with Device(fake_cuda, pages=4096) as device:
        cache = make_cache(device.pool)
        a = int(cache.open())
        cache.ensure(a, 50)
        ((start, size),) = slot_ranges(cache, a, 50)
        device.fake.hold(device.one)
        device.driver.fill(start, 7, size, device.one)
        cache.release(a, keep=True, stream=device.one)
        cache.reopen(a, 50)
        space: Any = cache._slots
        pinned = FakeDriver(fake_cuda).host_alloc(space.saved_bytes(a))
        space.copy_out(a, pinned, space.saved_bytes(a), device.two)
        device.fake.release(device.one)
        assert ctypes.string_at(pinned, size) == b"\7" * size
        FakeDriver(fake_cuda).ok("cuMemFreeHost", pinned)
        cache.close()


def far_window(device: Device) -> tuple[KeptSequences, int, int, int, int]:
    """A short sequence, and one in page-locked memory whose window lies far beyond it."""
    seqs = windowed(device.pool, "token")
    b = seqs.new(40)
    decode(seqs, b, 200)
    space: Any = seqs.cache._slots
    size, anchor = space.saved_bytes(b), space.anchor(b)
    pinned = FakeDriver(device.fake).host_alloc(size)
    space.copy_out(b, pinned, size, 0)
    seqs.release(b)
    seqs.cache.trim()
    a = seqs.new(38)
    return seqs, a, anchor, pinned, size


def test_what_a_far_window_leaves_is_not_taken_under_a_copy(fake_cuda: FakeCuda) -> None:
    with Device(fake_cuda, pages=4096) as device:
        seqs, a, anchor, pinned, size = far_window(device)
        space: Any = seqs.cache._slots
        seqs.keep(a, stream=device.one)
        device.fake.hold(device.two)
        b = seqs.fork(a, 37, stream=device.two)  # copies its tails
        space.copy_in(b, 200, anchor, pinned, size, 37, device.two)
        assert seqs.cache.first_token(b, 0) > 40
        device.blocks_until(device.two, seqs.cache.trim)
        FakeDriver(fake_cuda).ok("cuMemFreeHost", pinned)
        seqs.cache.check()
        seqs.cache.close()


def test_a_far_window_that_fails_leaves_nothing(fake_cuda: FakeCuda) -> None:
    """Whatever pages there were to take: the sequence is what it was."""
    fake_cuda.configure(stream_mode=StreamMode.LAZY)
    with Device(fake_cuda, pages=4096) as device:
        seqs, a, anchor, pinned, size = far_window(device)
        space: Any = seqs.cache._slots
        device.driver.synchronize(0)
        seqs.writers[a] = []
        seqs.write(a)
        pages = device.pool.stats().created_bytes // device.pool.page_bytes
        for more in range(16):
            device.pool.set_budget((pages + more) * device.pool.page_bytes)
            for call in ("cuMemMap", "cuMemSetAccess", "cuMemcpyHtoDAsync"):
                device.fake.fail(call, code=304)
                with pytest.raises((vattn.DriverError, OutOfPages)):
                    space.copy_in(a, 200, anchor, pinned, size, 38, 0)
                device.fake.clear_failures()
                device.driver.synchronize(0)
                seqs.check((more, call))
        space.copy_in(a, 200, anchor, pinned, size, 38, 0)
        device.driver.synchronize(0)
        seqs.cache.check()
        FakeDriver(fake_cuda).ok("cuMemFreeHost", pinned)
        seqs.cache.close()


def test_copies_follow_their_stream(fake_cuda: FakeCuda) -> None:
    """To and from page-locked memory nothing waits, and nothing is unmapped too early."""
    with Device(fake_cuda, pages=4096) as device:
        seqs = KeptSequences(make_cache(device.pool))
        space: Any = seqs.cache._slots
        a = seqs.new(90)
        writers, anchor, size = list(seqs.writers[a]), seqs.cache.anchor(a), space.saved_bytes(a)
        pinned = FakeDriver(fake_cuda).host_alloc(size)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        space.copy_out(a, pinned, size, device.one)
        seqs.release(a, stream=device.one)
        assert device.fake.pending(device.one) == 3  # the kernel, the copy, an event
        device.blocks_until(device.one, seqs.cache.trim)

        b = seqs.open()
        device.fake.hold(device.two)
        space.copy_in(b, 90, anchor, pinned, size, 0, device.two)
        assert device.fake.pending(device.two) > 0
        seqs.writers[b] = writers
        seqs.release(b, stream=device.two)
        device.blocks_until(device.two, seqs.cache.trim)

        b = seqs.open()
        space.copy_in(b, 90, anchor, pinned, size, 0, device.two)
        seqs.writers[b] = writers
        seqs.check()
        assert len(slot_ranges(seqs.cache, b, 90)) == 1
        FakeDriver(fake_cuda).ok("cuMemFreeHost", pinned)
        seqs.end()
