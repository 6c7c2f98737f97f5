"""The allocator and streams that work late: nothing is used again before its work is done.

The fake holds a stream's work back until a test lets it go. Whoever unmaps memory under unfinished
work is found by the fake, whoever uses pages too early by the bytes: a held fill runs late and
spoils what somebody else wrote there meanwhile.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.allocator_model import MIB, PAGE, Allocator
from tests.drivers import FakeMemory, make_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_cuda.fake import FakeCuda


class Device:
    """An allocator on the fake, and three streams of its driver."""

    def __init__(self, fake: FakeCuda, *, pages: int = 100, mapper: bool = False) -> None:
        fake.configure(granularity=PAGE, watchdog_ms=10_000)
        self.fake = fake
        driver = make_driver("cuda_fake")
        self.driver = driver
        self.streams = [driver.create_stream() for _ in range(3)]
        self.allocator = Allocator(driver, FakeMemory(fake), pages=pages, mapper=mapper)

    def fill(self, address: int, value: int, stream: int, nbytes: int = 0) -> None:
        """Work of `stream` that writes a block."""
        nbytes = nbytes or self.allocator.live[address].nbytes
        self.driver.fill(address, value, nbytes, stream)

    def forget(self, address: int) -> None:
        """Frees a block without waiting for its bytes."""
        self.allocator.core.free(address, self.allocator.live.pop(address).nbytes)
        self.allocator.core.check()

    def later(self, stream: int, act: Callable[[], object]) -> None:
        """`act` on another thread; it returns only after the held `stream` is released."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive(), errors
        self.fake.release(stream)
        thread.join()
        assert errors == []

    def end(self) -> None:
        for stream in self.streams:
            self.fake.release(stream)
        self.allocator.end()
        for stream in self.streams:
            self.driver.destroy_stream(stream)


@pytest.fixture(params=[False, True], ids=["inline", "mapper"])
def device(fake_cuda: FakeCuda, request: pytest.FixtureRequest) -> Iterator[Device]:
    device = Device(fake_cuda, mapper=request.param)
    yield device
    device.end()


def value_at(device: Device, address: int) -> int:
    return device.fake.read(address, 1)[0]


# A block's own stream ---------------------------------------------------------------------------


def test_the_same_stream_uses_a_block_at_once(device: Device) -> None:
    one, *_ = device.streams
    device.fake.hold(one)
    events = device.allocator.calls("event")
    address = device.allocator.core.allocate(3 * MIB, one)
    device.driver.fill(address, 1, 3 * MIB, one)
    device.allocator.core.free(address)
    assert device.allocator.core.allocate(3 * MIB, one) == address
    assert device.allocator.calls("event") == events
    device.allocator.core.free(address)


def test_another_stream_gets_other_memory(device: Device) -> None:
    one, two, _ = device.streams
    a = device.allocator.pages(30, one)
    device.fake.hold(one)
    device.fill(a, 1, one)
    device.forget(a)
    b = device.allocator.pages(30, two)
    assert abs(b - a) >= 30 * PAGE
    device.fake.release(one)
    device.allocator.verify()
    assert device.allocator.mapped_pages == 60


def test_another_stream_gets_idle_pages_when_their_work_is_done(device: Device) -> None:
    one, two, _ = device.streams
    device.allocator.free(device.allocator.pages(90, one))
    device.allocator.pages(90, two)
    assert device.fake.calls("cuStreamWaitEvent") == 0
    assert device.allocator.figures["pages_moved"] >= 80


def test_short_of_memory_another_stream_waits_and_no_thread_does(device: Device) -> None:
    """Pages whose work is not done are taken last, and their new user is ordered behind it."""
    one, two, _ = device.streams
    a = device.allocator.pages(60, one)
    device.fake.hold(one)
    device.fill(a, 1, one)
    device.forget(a)
    b = device.allocator.core.allocate(80 * PAGE, two)
    device.allocator.core.check()
    assert device.fake.calls("cuStreamWaitEvent") > 0
    assert device.fake.calls("cuMemUnmap") == 0
    device.driver.fill(b, 2, 80 * PAGE, two)
    assert device.fake.pending(two) > 0
    device.fake.release(one)
    assert {value_at(device, b + i * PAGE) for i in range(80)} == {2}
    device.allocator.core.free(b)


def test_a_third_stream_is_behind_both(device: Device) -> None:
    """What the second stream was ordered behind guards the pages from the third one, too."""
    one, two, three = device.streams
    a = device.allocator.pages(90, one)
    device.fake.hold(one)
    device.fill(a, 1, one)
    device.forget(a)
    b = device.allocator.core.allocate(90 * PAGE, two)
    device.allocator.core.free(b)
    c = device.allocator.core.allocate(90 * PAGE, three)
    device.driver.fill(c, 3, 90 * PAGE, three)
    device.allocator.core.check()
    device.fake.release(one)
    assert {value_at(device, c + i * PAGE) for i in range(90)} == {3}
    device.allocator.core.free(c)


def test_pages_come_back_to_where_they_were_in_order(device: Device) -> None:
    """From the first stream to the second and back, with the second one's work held."""
    one, two, _ = device.streams
    a = device.allocator.pages(80, one)
    device.allocator.free(a)
    b = device.allocator.core.allocate(80 * PAGE, two)
    device.fake.hold(two)
    device.driver.fill(b, 2, 80 * PAGE, two)
    device.allocator.core.free(b)
    a = device.allocator.core.allocate(80 * PAGE, one)
    device.driver.fill(a, 1, 80 * PAGE, one)
    device.allocator.core.check()
    device.fake.release(two)
    assert {value_at(device, a + i * PAGE) for i in range(80)} == {1}
    device.allocator.core.free(a)


def test_own_pages_move_in_the_order_of_their_stream(device: Device) -> None:
    """A larger block of the same stream takes them without a wait, and its work comes after."""
    one, *_ = device.streams
    blocks = [device.allocator.pages(20, one) for _ in range(5)]
    device.fake.hold(one)
    for address in blocks:
        device.fill(address, 1, one)
    for address in blocks[::2]:
        device.forget(address)
    big = device.allocator.core.allocate(60 * PAGE, one)
    assert device.fake.calls("cuMemUnmap") == 0
    device.driver.fill(big, 2, 60 * PAGE, one)
    device.allocator.core.check()
    device.fake.release(one)
    assert {value_at(device, big + i * PAGE) for i in range(60)} == {2}
    assert {value_at(device, blocks[1] + i * PAGE) for i in range(20)} == {1}
    for address in blocks[1::2]:
        device.forget(address)
    device.allocator.core.free(big)


def test_trim_waits_for_the_stream(device: Device) -> None:
    one, *_ = device.streams
    a = device.allocator.pages(40, one)
    device.fake.hold(one)
    device.fill(a, 1, one)
    device.forget(a)
    device.later(one, lambda: device.allocator.core.trim())
    assert device.allocator.physical_pages == 0


def test_the_end_waits_for_all_streams(fake_cuda: FakeCuda) -> None:
    """Also for those that a block was recorded for."""
    device = Device(fake_cuda)
    one, two, _ = device.streams
    a, b = device.allocator.pages(20, one), device.allocator.pages(20, one)
    device.allocator.core.record_stream(b, two)
    for stream, address in ((one, a), (two, b)):
        device.fake.hold(stream)
        device.fill(address, 1, stream)
        device.forget(address)
    device.fake.release(one)

    def end() -> None:
        del device.allocator.core

    device.later(two, end)
    assert fake_cuda.violations() == []
    for stream in device.streams:
        device.driver.destroy_stream(stream)


# record_stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [700, 20 * PAGE], ids=["piece", "block"])
def test_a_recorded_block_waits_for_every_stream(device: Device, nbytes: int) -> None:
    one, two, three = device.streams
    a = device.allocator.allocate(nbytes, one)
    for stream in (two, three, two):
        device.allocator.core.record_stream(a, stream)
    device.allocator.core.record_stream(a, one)  # its own, which is nothing new
    for stream in (two, three):
        device.fake.hold(stream)
        device.fill(a, 9, stream)
    device.forget(a)
    stats = device.allocator.figures
    assert (stats["pending_blocks"], stats["all"]["allocation"]["current"]) == (1, 0)
    assert stats["all"]["active"]["current"] == 1
    others = [device.allocator.allocate(nbytes, one)]
    device.fake.release(two)
    others.append(device.allocator.allocate(nbytes, one))
    assert a not in others
    device.fake.release(three)
    assert device.allocator.allocate(nbytes, one) == a
    assert device.allocator.figures["pending_blocks"] == 0
    device.allocator.verify()


def test_a_pending_block_is_nobodys(device: Device) -> None:
    one, two, _ = device.streams
    for nbytes in (700, 40 * PAGE):
        a = device.allocator.allocate(nbytes, one)
        device.allocator.core.record_stream(a, two)
        device.fake.hold(two)
        device.fill(a, 9, two)
        device.forget(a)
        assert not device.allocator.core.owns(a)
        with pytest.raises(ValueError, match="freed before"):
            device.allocator.core.free(a)
        with pytest.raises(ValueError, match="freed before"):
            device.allocator.core.record_stream(a, two)
        device.fake.release(two)


def test_a_record_needs_a_blocks_own_address(device: Device) -> None:
    one, two, _ = device.streams
    for nbytes in (2048, 40 * PAGE):
        a = device.allocator.allocate(nbytes, one)
        for inner in (a + 1, a + 512):
            with pytest.raises(ValueError, match=f"record_stream of 0x{inner:x}"):
                device.allocator.core.record_stream(inner, two)
    with pytest.raises(ValueError, match="record_stream of 0x7b"):
        device.allocator.core.record_stream(123, two)
    device.allocator.core.record_stream(0, two)  # as torch has it


def test_short_of_memory_recorded_blocks_are_waited_for(device: Device) -> None:
    one, two, _ = device.streams
    a = device.allocator.pages(70, one)
    device.allocator.core.record_stream(a, two)
    device.fake.hold(two)
    device.fill(a, 9, two)
    device.forget(a)
    device.later(two, lambda: device.allocator.pages(60, one))
    device.allocator.verify()


def test_a_record_ends_with_the_block(device: Device) -> None:
    """The next owner of the memory has nothing to do with the streams of the one before."""
    one, two, _ = device.streams
    for nbytes in (700, 40 * PAGE):
        a = device.allocator.allocate(nbytes, one)
        device.allocator.core.record_stream(a, two)
        device.forget(a)
        again = device.allocator.allocate(nbytes, one)
        assert again == a
        device.fake.hold(two)
        device.forget(again)
        assert device.allocator.figures["pending_blocks"] == 0
        device.fake.release(two)


# Streams that are gone --------------------------------------------------------------------------


def test_memory_of_a_destroyed_stream_is_not_lost(device: Device) -> None:
    gone = device.driver.create_stream()
    a, b, c = (device.allocator.pages(25, gone) for _ in range(3))
    d = device.allocator.pages(20, device.streams[0])
    device.allocator.core.record_stream(d, gone)
    device.forget(a)
    device.driver.destroy_stream(gone)
    device.forget(b)
    device.forget(d)
    device.allocator.pages(70, device.streams[0])
    device.forget(c)
    device.allocator.trim()
    assert device.allocator.mapped_pages == 70
