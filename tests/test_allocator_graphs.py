"""Graph pools: what a graph may touch keeps its address and its pages until the release."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.allocator_model import PAGE, Allocator
from tests.drivers import FakeMemory, make_driver
from tests.fake_cuda.fake import StreamMode
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_cuda.fake import FakeCuda

ONE, TWO = (0, 1), (0, 2)  # pools


class Device:
    """An allocator of 100 pages on the fake, a stream for captures and another."""

    def __init__(self, fake: FakeCuda) -> None:
        fake.configure(granularity=PAGE, watchdog_ms=10_000)
        self.fake = fake
        self.driver = make_driver("cuda_fake")
        self.side, self.main = self.driver.create_stream(), self.driver.create_stream()
        self.allocator = Allocator(self.driver, FakeMemory(fake), pages=100)
        self.core = self.allocator.core

    @contextmanager
    def capture(self, pool: tuple[int, int]) -> Iterator[None]:
        """What `side` is given in the block goes to a graph."""
        self.core.begin_graph_pool(pool, [self.side])
        self.fake.capture(self.side)
        yield
        self.fake.capture(self.side, on=False)
        self.core.end_graph_pool(pool)
        self.core.check()

    def node(self, pages: float) -> int:
        """Memory of a kernel that is captured. Nobody may touch its bytes but replays."""
        address = self.core.allocate(int(pages * PAGE), self.side)
        self.fake.launch(self.side, [(address, int(pages * PAGE))], "node")
        self.core.check()
        return address

    def replay(self, value: int, *nodes: tuple[int, float], stream: int | None = None) -> None:
        """Writes the nodes as a graph would; nothing is asked of the allocator."""
        for address, pages in nodes:
            self.driver.fill(
                address, value, int(pages * PAGE), self.main if stream is None else stream
            )

    def holds(self, value: int, address: int, pages: int) -> bool:
        return {self.fake.read(address + i * PAGE, 1)[0] for i in range(pages)} == {value}

    def end(self) -> None:
        for stream in (self.side, self.main):
            self.fake.release(stream)
        self.allocator.end()
        for stream in (self.side, self.main):
            self.driver.destroy_stream(stream)


@pytest.fixture
def device(fake_cuda: FakeCuda) -> Iterator[Device]:
    device = Device(fake_cuda)
    yield device
    device.end()


def test_a_graphs_memory_is_its_own_until_the_release(device: Device) -> None:
    with device.capture(ONE):
        a = device.node(30)
        b = device.node(20)
        device.core.free(b)  # the graph may write there all the same
        c = device.node(20)
        device.core.free(a)
        device.core.free(c)
    assert c == b  # in one graph memory is reused in its order
    device.allocator.trim()
    device.allocator.pages(50, device.main)
    with pytest.raises(_core.OutOfMemory, match=r"graph pool 0\.1"):
        device.allocator.pages(51, device.main)
    with pytest.raises(_core.OutOfMemory):
        device.allocator.pages(51, device.side)
    device.replay(7, (a, 30), (b, 20))
    assert device.holds(7, a, 30)
    assert device.holds(7, b, 20)
    device.allocator.verify()
    device.core.release_graph_pool(ONE)
    device.allocator.pages(50, device.main)


def test_two_graphs_share_a_pool(device: Device) -> None:
    with device.capture(ONE):
        a = device.node(40)
        device.core.free(a)
    with device.capture(ONE):
        assert device.node(40) == a
        b = device.node(20)
        device.core.free(b)
    device.core.release_graph_pool(ONE)
    with pytest.raises(_core.OutOfMemory):
        device.allocator.pages(60, device.main)
    device.replay(1, (a, 40), (b, 20))
    device.core.free(a)
    device.core.release_graph_pool(ONE)
    device.allocator.pages(90, device.main)


def test_two_pools_share_nothing(device: Device) -> None:
    with device.capture(ONE):
        a = device.node(30)
        device.core.free(a)
    with device.capture(TWO):
        b = device.node(30)
        device.core.free(b)
    assert abs(a - b) >= 30 * PAGE
    for pool in (ONE, TWO):
        device.core.release_graph_pool(pool)


def test_other_streams_allocate_meanwhile(device: Device) -> None:
    x = device.allocator.pages(20, device.main)
    with device.capture(ONE):
        a = device.node(20)
        y = device.allocator.pages(20, device.main)
        device.allocator.free(x)
        z = device.allocator.pages(20, device.main)
        device.core.free(a)
    assert z == x
    device.core.release_graph_pool(ONE)
    device.allocator.free(y)


def test_a_capture_takes_idle_pages_and_waits_for_nobody(device: Device) -> None:
    """An event of a stream outside would break the capture, so only finished work will do."""
    device.allocator.free(device.allocator.pages(90, device.main))
    with device.capture(ONE):
        a = device.node(50)
    assert device.fake.calls("cuStreamWaitEvent") == 0
    device.core.free(a)
    device.core.release_graph_pool(ONE)
    b = device.allocator.pages(60, device.main)
    device.fake.hold(device.main)
    device.replay(3, (b, 60))
    device.core.free(b)
    del device.allocator.live[b]
    with device.capture(TWO), pytest.raises(_core.OutOfMemory):
        device.core.allocate(80 * PAGE, device.side)
    device.fake.release(device.main)
    device.core.release_graph_pool(TWO)


@pytest.mark.parametrize("nbytes", [700, 20 * PAGE], ids=["piece", "block"])
def test_a_block_freed_during_a_capture_waits_for_its_end(device: Device, nbytes: int) -> None:
    """An event in the captured stream would be a part of the graph."""
    a = device.allocator.allocate(nbytes, device.main)
    device.fake.hold(device.side)
    device.driver.fill(a, 5, nbytes, device.side)
    device.core.record_stream(a, device.side)
    with device.capture(ONE):
        recorded = device.fake.calls("cuEventRecord")
        device.core.free(a)
        del device.allocator.live[a]
        assert device.core.figures()["pending_blocks"] == 1
        b = device.allocator.allocate(nbytes, device.main)
        assert device.fake.calls("cuEventRecord") == recorded
    c = device.allocator.allocate(nbytes, device.main)
    assert a not in (b, c)
    device.fake.release(device.side)
    assert device.allocator.allocate(nbytes, device.main) == a
    device.core.release_graph_pool(ONE)


def test_two_captures_at_once(device: Device) -> None:
    """A block that was recorded for both streams is freed after the end of the later one."""
    other = device.driver.create_stream()
    a = device.allocator.pages(20, device.main)
    for stream in (device.side, other):
        device.core.record_stream(a, stream)
    device.core.begin_graph_pool(ONE, [device.side])
    device.core.begin_graph_pool(TWO, [other])
    b, c = device.core.allocate(PAGE, device.side), device.core.allocate(PAGE, other)
    device.allocator.free(a)
    device.core.end_graph_pool(ONE)
    assert device.core.figures()["pending_blocks"] == 1
    device.core.end_graph_pool(TWO)
    device.allocator.trim()
    assert device.core.figures()["pending_blocks"] == 0
    device.core.free(b)
    device.core.free(c)
    for pool in (ONE, TWO):
        device.core.release_graph_pool(pool)
    device.allocator.trim()
    device.driver.destroy_stream(other)


def test_a_released_pools_memory_waits_for_the_last_replay(device: Device) -> None:
    """On whatever stream it was, also on one that never asked for memory."""
    with device.capture(ONE):
        a = device.node(80)
        device.core.free(a)
    stranger = device.driver.create_stream()
    device.fake.stream_mode(stranger, StreamMode.LAZY)
    device.replay(9, (a, 80), stream=stranger)
    device.core.release_graph_pool(ONE)
    assert device.fake.pending(stranger) == 1
    device.fake.launch(stranger, [(a, 80 * PAGE)], "replay")
    b = device.core.allocate(90 * PAGE, device.side)
    assert device.fake.pending(stranger) == 0
    device.driver.fill(b, 4, 90 * PAGE, device.side)
    device.core.check()
    assert device.holds(4, b, 90)
    device.core.free(b)
    device.allocator.trim()
    device.driver.destroy_stream(stranger)


def test_an_old_pools_output_dies_during_a_new_capture(device: Device) -> None:
    """No event is recorded in a stream that is being captured."""
    with device.capture(ONE):
        out = device.core.allocate(3000, device.side)
    device.core.release_graph_pool(ONE)
    with device.capture(TWO):
        device.core.free(out)
        node = device.core.allocate(40 * PAGE, device.side)
        device.core.check()
    device.core.free(node)
    device.core.release_graph_pool(TWO)


def test_many_released_pools_do_not_use_up_the_addresses(device: Device) -> None:
    for i in range(40):
        pool = (0, 10 + i)
        with device.capture(pool):
            node = device.core.allocate(3 * PAGE, device.side)
        device.core.free(node)
        device.core.release_graph_pool(pool)
    device.core.check()
    assert device.driver.counters()["reserve"][0] - device.driver.counters()["release"][0] < 20


def test_a_released_pool_that_cannot_be_unmapped_is_free_as_before(device: Device) -> None:
    with device.capture(ONE):
        nodes = [
            device.core.allocate(30 * PAGE, device.side),
            device.core.allocate(3000, device.side),
        ]
    for node in nodes:
        device.core.free(node)
    device.core.release_graph_pool(ONE)
    device.fake.fail("cuMemUnmap", code=304)
    with pytest.raises(_core.DriverError):
        device.core.trim()
    device.core.check()
    device.fake.clear_failures()
    big = device.core.allocate(90 * PAGE, device.main)
    device.core.check()
    device.core.free(big)


def test_outputs_outlive_the_release(device: Device) -> None:
    with device.capture(ONE):
        a = device.node(30)
    device.core.release_graph_pool(ONE)
    device.replay(6, (a, 30))
    device.allocator.pages(70, device.main)
    assert device.holds(6, a, 30)
    device.core.free(a)
    device.allocator.trim()
    assert device.allocator.mapped_pages == 70


def test_graph_pools_that_are_not_there(device: Device) -> None:
    for act in (device.core.end_graph_pool, device.core.release_graph_pool):
        with pytest.raises(ValueError, match=r"graph pool \(0, 1\)"):
            act(ONE)
    device.core.begin_graph_pool(ONE, [device.side])
    with pytest.raises(ValueError, match="end that first"):
        device.core.begin_graph_pool(ONE, [device.side])
    device.core.end_graph_pool(ONE)
    device.core.release_graph_pool(ONE)
    with pytest.raises(ValueError, match="no graph pool"):
        device.core.release_graph_pool(ONE)


def test_a_release_ends_a_capture_that_failed(device: Device) -> None:
    """As PyTorch destroys a graph whose capture failed: released, and never ended."""
    a = device.allocator.pages(1, device.main)
    device.core.record_stream(a, device.side)
    device.core.begin_graph_pool(ONE, [device.side])
    b = device.core.allocate(PAGE, device.side)
    device.allocator.free(a)
    assert device.core.figures()["pending_blocks"] == 1
    device.core.release_graph_pool(ONE)
    with pytest.raises(ValueError, match="nobody allocates to the graph pool"):
        device.core.end_graph_pool(ONE)
    c = device.core.allocate(PAGE, device.side)
    device.core.check()
    device.core.free(b)
    device.core.free(c)
    assert device.allocator.pages(1, device.main) == a
