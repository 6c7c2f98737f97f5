"""Nothing is unmapped, remapped or reused under work that a stream has not finished.

The fake holds a stream's work back until a test lets it go, and logs what is taken from under an
unfinished kernel; `fake_cuda` asserts at the end that the log is empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pytest

import vattn
from tests.blocking import blocks_until
from tests.drivers import make_driver
from tests.helpers import (
    SMALL_PAGE,
    Sequences,
    launch,
    layer_specs,
    make_cache,
    make_pool,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_cuda.fake import FakeCuda


class Device:
    """A pool on the fake, and two streams of its driver."""

    def __init__(self, fake: FakeCuda, pages: int) -> None:
        fake.configure(granularity=SMALL_PAGE, watchdog_ms=10_000)
        self.fake = fake
        self.driver = make_driver("cuda_fake")
        self.one, self.two = self.driver.create_stream(), self.driver.create_stream()
        self.pool = make_pool(self.driver, pages=pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.one, self.two):
            self.fake.release(stream)
            self.driver.destroy_stream(stream)

    def kernel(self, cache: vattn.KVCache, slot: int, stream: int, tokens: int = 0) -> None:
        launch(self.fake, cache, slot, tokens or cache.tokens(slot), stream)

    def blocks_until(self, stream: int, act: Callable[[], object]) -> None:
        """`act` does not return, and unmaps nothing, before the held `stream` has finished."""
        blocks_until(self.fake, stream, act)


@pytest.fixture
def device(fake_cuda: FakeCuda) -> Device:
    return Device(fake_cuda, pages=4096)


@pytest.fixture
def small_device(fake_cuda: FakeCuda) -> Device:
    """With room for one full sequence and a half: 15 pages and 7."""
    return Device(fake_cuda, pages=22)


def test_a_slot_is_taken_over_after_its_last_kernel(device: Device) -> None:
    """On another stream, without a call that blocks or maps: the stream waits for an event."""
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(50)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.cache.release(a, stream=device.one)
        mapped = device.fake.calls("cuMemMap")
        b = int(seqs.cache.open(expected_tokens=40))
        assert b == a
        seqs.cache.ensure(b, 40, stream=device.two)
        assert device.fake.calls("cuMemMap") == mapped
        device.kernel(seqs.cache, b, device.two)
        assert device.fake.pending(device.two) > 0
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        seqs.cache.close()


def test_a_fork_takes_a_slot_over_after_its_last_kernel(device: Device) -> None:
    with device:
        seqs = Sequences(make_cache(device.pool))
        a, b = seqs.new(5), seqs.new(5)  # less than a page: the fork's tail goes to b's page
        device.fake.hold(device.one)
        device.kernel(seqs.cache, b, device.one)
        seqs.release(b, stream=device.one)
        child = int(seqs.cache.fork(a, stream=device.two))
        assert child == b
        device.kernel(seqs.cache, child, device.two)
        assert device.fake.pending(device.two) == 3  # a wait, a copy, the kernel
        assert device.fake.calls("cuMemUnmap") == 0
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        seqs.writers[child] = seqs.writers[a][:]
        seqs.check()
        seqs.end()


def test_the_same_stream_needs_no_event(device: Device) -> None:
    with device:
        cache = make_cache(device.pool)
        slot = cache.open()
        cache.ensure(slot, 50, stream=device.one)
        cache.release(slot, stream=device.one)
        slot = cache.open()
        cache.ensure(slot, 50, stream=device.one)
        assert device.fake.calls("cuStreamWaitEvent") == 0
        cache.close()


def test_reclaim_takes_what_is_finished_and_else_waits(small_device: Device) -> None:
    device = small_device
    with device:
        seqs = Sequences(make_cache(device.pool))
        a, b = seqs.new(50), seqs.new(40)  # 8 pages and 6
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.release(a, stream=device.one)
        seqs.release(b, stream=device.two)
        c = seqs.open(slot=2)
        seqs.grow(c, 95, stream=device.two)  # 14 pages: 8 free ones and b's
        assert device.fake.pending(device.one) > 0
        device.blocks_until(device.one, lambda: seqs.grow(c, 100, stream=device.two))
        seqs.check()
        seqs.release(c)
        seqs.end()


def test_a_lowered_budget_waits(device: Device) -> None:
    with device:
        seqs = Sequences(make_cache(device.pool))
        a, b = seqs.new(100), seqs.new(20)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.release(a, stream=device.one)
        device.blocks_until(device.one, lambda: device.pool.set_budget(5 * SMALL_PAGE))
        assert device.driver.physical_bytes() == 5 * SMALL_PAGE
        seqs.check()
        seqs.release(b)
        seqs.end()


def test_what_a_truncate_leaves_is_not_taken_under_a_kernel(small_device: Device) -> None:
    device = small_device
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(100)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.cache.truncate(a, 10, stream=device.one)
        del seqs.writers[a][10:]
        b = seqs.open()
        device.blocks_until(device.one, lambda: seqs.grow(b, 90, stream=device.two))
        seqs.check()
        seqs.end()


@pytest.mark.parametrize("tile", [1, 16])
def test_pages_that_left_a_window_wait_for_their_readers(device: Device, tile: int) -> None:
    with device:
        cache = make_cache(
            device.pool, layer_specs(device.pool, window=8), max_tokens=400, tile=tile
        )
        slot = int(cache.open())
        cache.ensure(slot, 30, stream=device.one)
        device.fake.hold(device.one)
        for tokens in range(31, 100):
            device.kernel(cache, slot, device.one)  # the step before, unfinished as all before it
            cache.ensure(slot, tokens, stream=device.one)
        assert cache.stats().pages_recycled == 0
        device.fake.release(device.one)
        for tokens in range(100, 200):
            cache.ensure(slot, tokens, stream=device.one)
            device.kernel(cache, slot, device.one)
        assert cache.stats().pages_recycled > 10
        cache.check()
        cache.close()


def test_a_window_that_moves_without_growing(device: Device) -> None:
    """Steps inside prepared pages leave nothing; the next that grows must not recycle at once."""
    with device:
        cache = make_cache(device.pool, layer_specs(device.pool, window=8), max_tokens=400)
        slot = int(cache.open())
        cache.ensure(slot, 30, stream=device.one)
        cache.prepare([slot], [60], stream=device.one).wait()
        device.fake.hold(device.one)
        device.kernel(cache, slot, device.one)
        for tokens in (50, 60, 61, 80):
            cache.ensure(slot, tokens, stream=device.one)
            device.kernel(cache, slot, device.one)
        cache.check()
        device.fake.release(device.one)
        cache.close()


def test_a_remap_for_a_reorder_waits(device: Device) -> None:
    with device:
        seqs = Sequences(make_cache(device.pool))
        a, b = seqs.new(60), seqs.new(60)
        device.fake.hold(device.one)
        for slot in (a, b):
            device.kernel(seqs.cache, slot, device.one)

        def reorder() -> None:
            seqs.cache.assign([a, b], [b, a], stream=device.one)

        device.blocks_until(device.one, reorder)
        seqs.writers[a], seqs.writers[b] = seqs.writers[b], seqs.writers[a]
        seqs.check()
        seqs.end()


def test_staging_memory_is_not_shared_by_two_streams_at_once(device: Device) -> None:
    """The tails of equal prefixes are copied only; the second reorder's staging waits its turn."""
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(30)
        beams = [a, *(seqs.fork(a) for _ in range(3))]
        for slot in beams:
            seqs.grow(slot, 33)
        device.fake.hold(device.one)
        seqs.cache.assign(beams[:2], beams[1::-1], stream=device.one)
        seqs.cache.assign(beams[2:], beams[:1:-1], stream=device.two)
        assert device.fake.pending(device.one) > 0
        assert device.fake.pending(device.two) > 0
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        for one, other in (beams[:2], beams[2:]):
            seqs.writers[one], seqs.writers[other] = seqs.writers[other], seqs.writers[one]
        seqs.check()
        seqs.end()


def test_trim_waits_for_staging_copies_of_a_reorder_that_failed(device: Device) -> None:
    with device:
        seqs = Sequences(make_cache(device.pool))
        a, b = seqs.new(30), seqs.new(60)
        device.fake.hold(device.one)
        device.fake.fail("cuMemCreate", nth=2, code=304)  # the first is the staging memory's
        with pytest.raises(vattn.DriverError, match="304"):
            seqs.cache.assign([a, b], [b, a], stream=device.one)
        assert device.fake.pending(device.one) > 0
        device.blocks_until(device.one, seqs.cache.trim)
        seqs.check()
        seqs.end()


def test_a_shared_page_is_written_after_the_readers_of_its_other_users(device: Device) -> None:
    """A reader of the shared page has ended, its kernel on another stream has not."""
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(60)
        b = seqs.fork(a)
        device.fake.hold(device.two)
        device.kernel(seqs.cache, b, device.two)
        seqs.release(b, stream=device.two)
        seqs.cache.truncate(a, 5, stream=device.one)
        seqs.cache.ensure(a, 20, stream=device.one)  # writes in place what b's kernel reads
        device.kernel(seqs.cache, a, device.one)
        assert device.fake.pending(device.one) > 0
        device.fake.release(device.two)
        assert device.fake.pending(device.one) == 0
        seqs.cache.close()


def test_copy_on_write_inside_the_cover_waits(device: Device) -> None:
    """The tile is as long as before the truncate, so nothing seemed to change: but a page moves."""
    with device:
        cache = make_cache(device.pool, layer_specs(device.pool, 1, head_dim=64), tile=64)
        seqs = Sequences(cache)  # 8 tokens are a page
        a = seqs.new(60)
        b = seqs.fork(a)
        device.fake.hold(device.one)
        device.kernel(cache, b, device.one)
        cache.truncate(b, 8, stream=device.one)
        del seqs.writers[b][8:]
        device.blocks_until(device.one, lambda: seqs.grow(b, 20, stream=device.one))
        seqs.check()
        seqs.end()


def test_prepare_moves_nothing_that_is_read(device: Device) -> None:
    """It runs beside kernels that may not even be launched yet: what must be copied is ensure's."""
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(60)
        b = seqs.fork(a)
        seqs.truncate(b, 10)  # inside a page that a still uses
        device.fake.hold(device.one)
        seqs.cache.prepare([b, a], [40, 90], stream=device.one).wait()
        assert device.fake.calls("cuMemUnmap") == 0
        device.kernel(seqs.cache, b, device.one)
        assert seqs.cache.pages_needed(a, 90) == 0 < seqs.cache.pages_needed(b, 40)
        seqs.check()
        device.blocks_until(device.one, lambda: seqs.grow(b, 40, stream=device.one))
        seqs.grow(a, 90)
        seqs.check()
        seqs.end()


def test_close_waits(device: Device) -> None:
    with device:
        cache = make_cache(device.pool)
        slot = int(cache.open())
        cache.ensure(slot, 50)
        device.fake.hold(device.one)
        device.kernel(cache, slot, device.one)
        cache.release(slot, stream=device.one)
        device.blocks_until(device.one, cache.close)
        device.pool.trim()
        assert device.driver.physical_bytes() == 0


def test_nothing_waits_when_there_is_room(device: Device) -> None:
    """Growing, forking and ending beside running kernels blocks nowhere."""
    with device:
        seqs = Sequences(make_cache(device.pool))
        a = seqs.new(40)
        device.fake.hold(device.one)
        device.kernel(seqs.cache, a, device.one)
        seqs.cache.ensure(a, 60, stream=device.one)
        b = int(seqs.cache.fork(a, stream=device.one))
        seqs.cache.ensure(b, 70, stream=device.one)
        for slot in (a, b):
            device.kernel(seqs.cache, slot, device.one)
            seqs.cache.release(slot, stream=device.one)
        c = int(seqs.cache.open())
        seqs.cache.ensure(c, 60, stream=device.one)
        assert device.fake.calls("cuEventSynchronize") == 0
        assert device.fake.pending(device.one) > 2
        device.fake.release(device.one)
        seqs.cache.close()
