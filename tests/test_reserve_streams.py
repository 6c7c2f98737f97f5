"""Virtual tensors on streams that are not done, and under driver calls that fail.

The fake holds a stream's work back until a test lets it go, and logs what is taken from under an
unfinished kernel; `fake_cuda` asserts at the end that the log is empty.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch

import vattn
from tests.blocking import blocks_until
from tests.drivers import make_driver
from tests.fake_cuda import fake as fk
from tests.helpers import SMALL_PAGE, make_pool

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = 64
WIDTH = 3 * SMALL_PAGE // 4  # rows 4n to 4n + 3 are three pages
OPERATING_SYSTEM = 304  # a CUresult that is neither memory nor fatal


class Device:
    """A pool on the fake, two streams of its driver, and a table."""

    def __init__(self, fake: fk.FakeCuda, pages: int = 4096) -> None:
        fake.configure(granularity=SMALL_PAGE, watchdog_ms=10_000)
        self.fake = fake
        self.driver = make_driver("cuda_fake")
        self.one, self.two = self.driver.create_stream(), self.driver.create_stream()
        self.pool = make_pool(self.driver, pages=pages)
        table, handle = vattn.reserve((ROWS, WIDTH), torch.uint8, pool=self.pool)
        self.table: torch.Tensor | None = table
        self.handle: vattn.VirtualTensor | None = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.one, self.two):
            self.fake.release(stream)
        self.table = self.handle = None
        if self.pool.stats().used_bytes > 0:  # an error's traceback may hold the handle
            gc.collect()
        for stream in (self.one, self.two):
            self.driver.destroy_stream(stream)
        self.pool.check()
        self.pool.trim()
        assert self.driver.physical_bytes() == 0

    @property
    def rows(self) -> vattn.VirtualTensor:
        assert self.handle is not None
        return self.handle

    def kernel(self, begin: int, end: int, stream: int) -> None:
        """Uses rows [begin, end)."""
        start = self.rows.tensor.data_ptr()
        self.fake.launch(stream, [(start + begin * WIDTH, (end - begin) * WIDTH)], "kernel")

    def blocks_until(
        self, stream: int, act: Callable[[], object], meanwhile: Callable[[], object] | None = None
    ) -> None:
        """`act` does not return, and unmaps nothing, before the held `stream` has finished."""
        blocks_until(self.fake, stream, act, meanwhile)


@pytest.fixture
def device(fake_cuda: fk.FakeCuda) -> Device:
    return Device(fake_cuda)


# Streams ------------------------------------------------------------------------------------------


def test_giving_up_waits_for_its_stream_only(device: Device) -> None:
    """Not for another one, and the device is free for others meanwhile."""
    with device:
        device.rows.commit(40, stream=device.one)
        device.fake.hold(device.one)
        device.fake.hold(device.two)
        device.kernel(0, 40, device.one)
        device.kernel(0, 3, device.two)
        other = vattn.reserve((ROWS, WIDTH), torch.uint8, pool=device.pool)[1]
        device.blocks_until(
            device.one,
            lambda: device.rows.decommit(slice(4, None), stream=device.one),
            meanwhile=lambda: other.commit(10, stream=device.one),
        )
        assert device.fake.pending(device.two) == 1
        assert (
            device.fake.calls("cuCtxSynchronize") == device.fake.calls("cuStreamSynchronize") == 0
        )
        assert device.rows.committed == [range(4)]
        device.rows.check()
        other.close()


def test_growing_waits_for_nothing(device: Device) -> None:
    """Nor does giving up rows whose page stays."""
    with device:
        device.fake.hold(device.one)
        for rows in (3, 9, 30):
            device.rows.commit(rows, stream=device.one)
            device.kernel(0, rows, device.one)
        device.rows.decommit(slice(28, 29), stream=device.one)
        assert device.rows.committed == [range(28), range(29, 30)]
        assert device.fake.calls("cuEventSynchronize") == 0
        assert device.fake.pending(device.one) > 3


def test_zeros_come_after_the_last_write_to_a_row(device: Device) -> None:
    """In a page that stayed: written and given up on one stream, committed on another."""
    with device:
        device.rows.commit(2, stream=device.one)
        device.fake.hold(device.one)
        device.driver.fill(device.rows.tensor.data_ptr(), 9, WIDTH, device.one)
        device.rows.decommit(1, stream=device.one)
        assert device.fake.calls("cuMemUnmap") == 0
        device.rows.commit(2, stream=device.two)
        device.fake.release(device.one)
        assert device.fake.pending(device.two) == 0
        assert bool((device.rows.view() == 0).all())


def test_pages_are_not_taken_before_their_zeros_are_written(device: Device) -> None:
    with device:
        device.fake.hold(device.one)
        device.rows.commit(20, stream=device.one)
        device.blocks_until(device.one, lambda: device.rows.decommit(20, stream=device.two))


def test_close_waits(device: Device) -> None:
    with device:
        device.rows.commit(20, stream=device.one)
        device.fake.hold(device.one)
        device.kernel(0, 20, device.one)
        device.blocks_until(device.one, lambda: device.rows.close(stream=device.one))
        assert device.rows.closed


def test_an_end_without_close_waits_too(device: Device) -> None:
    """In the thread that drops the last tensor, without the GIL."""
    with device:
        device.rows.commit(20, stream=device.one)
        device.fake.hold(device.one)
        device.kernel(0, 20, device.one)
        last = [device.rows.tensor]
        device.table = device.handle = None
        device.blocks_until(device.one, last.clear)
        assert device.pool.stats().used_bytes == 0


# Failures -----------------------------------------------------------------------------------------


class Script:
    """Commits and gives up in holes, on two streams; `attempt` checks what a failure leaves."""

    def __init__(self, device: Device) -> None:
        self.device, self.rows = device, device.rows
        self.record: dict[int, int] = {}
        self.errors: list[type[Exception]] = []

    def attempt(self, act: Callable[..., None], *arguments: Any) -> None:
        streams = (self.device.one, self.device.two)
        stream = streams[len(self.record) % 2]
        before = self.rows.committed, self.rows.committed_bytes
        try:
            act(*arguments, stream=stream)
        except (vattn.DriverError, vattn.OutOfPages) as error:
            self.errors.append(type(error))
            assert (self.rows.committed, self.rows.committed_bytes) == before
            self.check()
            act(*arguments, stream=stream)

    def check(self) -> None:
        self.rows.check()
        for row, value in self.record.items():
            assert bool((self.rows.tensor[row] == value).all()), row

    def commit(self, begin: int, end: int) -> None:
        self.attempt(self.rows.commit, slice(begin, end))
        for row in set(range(begin, end)) - set(self.record):
            assert bool((self.rows.tensor[row] == 0).all()), row
            self.rows.tensor[row] = self.record[row] = row + 1
        self.check()

    def decommit(self, begin: int, end: int) -> None:
        self.attempt(self.rows.decommit, slice(begin, end))
        for row in range(begin, end):
            self.record.pop(row, None)
        self.check()

    def run(self) -> None:
        self.commit(0, 5)
        self.commit(9, 10)
        self.commit(20, 30)
        self.decommit(22, 27)
        self.commit(2, 40)  # around holes and over them, in pages new and old
        self.decommit(1, 2)
        self.commit(1, 2)
        self.decommit(3, 39)
        self.commit(30, 50)
        self.decommit(0, ROWS)  # several stretches
        self.commit(0, 7)
        self.attempt(self.rows.close)


CALLS = [
    ("cuMemCreate", fk.OUT_OF_MEMORY), ("cuMemCreate", OPERATING_SYSTEM),
    ("cuMemMap", OPERATING_SYSTEM), ("cuMemMap", fk.OUT_OF_MEMORY),
    ("cuMemSetAccess", OPERATING_SYSTEM), ("cuMemSetAccess", fk.OUT_OF_MEMORY),
    ("cuMemUnmap", OPERATING_SYSTEM), ("cuMemsetD8Async", OPERATING_SYSTEM),
    ("cuEventCreate", OPERATING_SYSTEM), ("cuEventRecord", OPERATING_SYSTEM),
    ("cuEventSynchronize", OPERATING_SYSTEM), ("cuEventQuery", OPERATING_SYSTEM),
    ("cuStreamWaitEvent", OPERATING_SYSTEM),
]  # fmt: skip


@pytest.mark.parametrize(("call", "code"), CALLS)
def test_a_failed_call_leaves_everything_as_it_was(
    fake_cuda: fk.FakeCuda, call: str, code: int
) -> None:
    """Each call of the script fails once; what waits for an event has another way to wait."""
    calm, failures = {"cuEventCreate", "cuEventRecord", "cuEventSynchronize"}, 0
    for nth in range(1, 200):
        fake_cuda.reset()
        with Device(fake_cuda) as device:
            script = Script(device)
            fake_cuda.fail(call, nth=nth, code=code)
            script.run()
            injected = fake_cuda.stats().failures_injected
            fake_cuda.clear_failures()
            failures += len(script.errors)
            del script
        assert fake_cuda.violations() == []
        del device
        assert fake_cuda.leaks() == []
        if not injected:
            break
    else:
        pytest.fail("the script is longer than expected")
    assert nth > 2, "the script makes no such call"
    assert (failures > 0) == (call not in calm)


def test_what_cannot_be_undone_ends_it_and_only_it(device: Device) -> None:
    with device:
        other = vattn.reserve((ROWS, WIDTH), torch.uint8, pool=device.pool)[1]
        other.commit(3)
        device.rows.commit(4)
        device.fake.fail("cuMemSetAccess", code=OPERATING_SYSTEM)
        device.fake.fail("cuMemUnmap", code=OPERATING_SYSTEM)
        with pytest.raises(vattn.DriverError, match="304"):
            device.rows.commit(8)
        for act in (device.rows.commit, device.rows.decommit):
            with pytest.raises(vattn.DriverError, match=r"could not be undone.*reserve a new one"):
                act(9)
        with pytest.raises(vattn.DriverError, match="could not be undone"):
            device.rows.check()
        other.commit(8)
        device.fake.hold(device.one)
        device.kernel(0, 4, device.one)
        device.blocks_until(device.one, lambda: device.rows.close(stream=device.one))
        assert device.rows.closed
        device.pool.check()
        other.close()


def test_a_lost_context_is_told_as_such(fake_cuda: fk.FakeCuda) -> None:
    with Device(fake_cuda) as device:
        device.rows.commit(4)
        fake_cuda.sticky(fk.ILLEGAL_ADDRESS)
        for act in (device.rows.commit, device.rows.decommit):
            with pytest.raises(vattn.DriverError) as caught:
                act(20)
            assert caught.value.fatal
        fake_cuda.sticky(0)
        device.rows.close()
