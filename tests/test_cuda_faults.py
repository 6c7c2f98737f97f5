"""The cuda driver on the fake libcuda: what it does when calls fail."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.cuda_run import PAGE, Run, failure_of
from tests.drivers import make_driver
from tests.fake_cuda import fake as fk
from vattn import DriverError, OutOfPages

if TYPE_CHECKING:
    from tests.fake_cuda.fake import FakeCuda
    from vattn._core import Driver

OPERATING_SYSTEM = 304  # a CUresult that is neither memory nor fatal


@pytest.fixture
def driver(fake_cuda: FakeCuda) -> Driver:
    fake_cuda.configure(watchdog_ms=5000)
    return make_driver("cuda_fake")


@pytest.fixture
def run(driver: Driver) -> Iterator[Run]:
    run = Run(driver)
    yield run
    run.close()


# Failing calls.


@pytest.mark.parametrize(
    ("call", "work"),
    [
        ("cuMemAddressReserve", lambda d: d.reserve(PAGE, PAGE)),
        ("cuMemCreate", lambda d: d.create(4, PAGE)),
        ("cuMemGetInfo", lambda d: d.memory_info()),
        ("cuStreamCreate", lambda d: d.create_stream()),
        ("cuStreamSynchronize", lambda d: d.synchronize()),
        ("cuEventCreate", lambda d: d.record()),
        ("cuEventRecord", lambda d: d.record()),
        ("cuCtxGetCurrent", lambda d: d.memory_info()),
        ("cuThreadExchangeStreamCaptureMode", lambda d: d.memory_info()),
    ],
)
def test_error_says_what_failed(
    fake_cuda: FakeCuda, driver: Driver, call: str, work: Callable[[Driver], Any]
) -> None:
    fake_cuda.fail(call, code=OPERATING_SYSTEM)
    error = failure_of(lambda: work(driver))
    assert "CUDA_ERROR_OPERATING_SYSTEM (304)" in str(error)
    assert error.call == call
    assert error.code == OPERATING_SYSTEM
    assert not error.fatal


def test_error_carries_the_arguments(fake_cuda: FakeCuda, run: Run) -> None:
    fake_cuda.fail("cuMemUnmap", code=OPERATING_SYSTEM)
    with pytest.raises(DriverError, match=rf"base={hex(run.base)}, bytes={run.bytes}\)"):
        run.driver.unmap(run.base, run.bytes)


@pytest.mark.parametrize(
    ("call", "nth"), [("cuMemAddressReserve", 1), ("cuMemCreate", 5), ("cuMemMap", 3),
                      ("cuMemSetAccess", 1)]
)  # fmt: skip
def test_out_of_memory_is_recoverable(
    fake_cuda: FakeCuda, driver: Driver, call: str, nth: int
) -> None:
    fake_cuda.fail(call, nth=nth, code=fk.OUT_OF_MEMORY)
    base, pages = 0, list[int]()
    try:
        base = driver.reserve(8 * PAGE, PAGE)
        pages = driver.create(8, PAGE)
        driver.map(base, pages, PAGE)
        driver.set_access(base, 8 * PAGE)
    except OutOfPages as error:
        assert call in str(error)
    else:
        pytest.fail("nothing was raised")
    stats = fake_cuda.stats()
    assert stats.handles_live == len(pages)
    assert stats.mappings_live == (8 if call == "cuMemSetAccess" else 0)
    if stats.mappings_live:
        driver.unmap(base, 8 * PAGE)
    driver.destroy(pages, PAGE)
    if base:
        driver.release(base, 8 * PAGE)
    Run(driver).close()


def test_device_that_is_full(fake_cuda: FakeCuda, driver: Driver) -> None:
    fake_cuda.configure(device_bytes=10 * PAGE)
    pages = driver.create(8, PAGE)
    with pytest.raises(OutOfPages, match="release sequences"):
        driver.create(3, PAGE)
    assert driver.memory_info() == (2 * PAGE, 10 * PAGE)
    pages += driver.create(2, PAGE)
    assert driver.memory_info()[0] == 0
    driver.destroy(pages, PAGE)


def test_map_that_fails_is_undone_in_one_call(fake_cuda: FakeCuda, driver: Driver) -> None:
    base, pages = driver.reserve(8 * PAGE, PAGE), driver.create(8, PAGE)
    for nth, unmaps in [(1, 0), (8, 1)]:
        fake_cuda.reset_calls()
        fake_cuda.fail("cuMemMap", nth=nth, code=OPERATING_SYSTEM)
        with pytest.raises(DriverError, match=rf"page={nth - 1}, of=8"):
            driver.map(base, pages, PAGE)
        assert fake_cuda.calls("cuMemUnmap") == unmaps
        assert fake_cuda.stats().mappings_live == 0
    driver.map(base, pages, PAGE)
    driver.unmap(base, 8 * PAGE)
    driver.destroy(pages, PAGE)
    driver.release(base, 8 * PAGE)


def test_undo_that_fails_can_be_done_later(fake_cuda: FakeCuda, driver: Driver) -> None:
    base, pages = driver.reserve(8 * PAGE, PAGE), driver.create(8, PAGE)
    fake_cuda.fail("cuMemMap", nth=4, code=OPERATING_SYSTEM)
    fake_cuda.fail("cuMemUnmap", code=OPERATING_SYSTEM)
    error = failure_of(lambda: driver.map(base, pages, PAGE))
    assert error.call == "cuMemUnmap"
    assert "roll_back" in str(error)
    with pytest.raises(ValueError, match="mapped"):
        driver.release(base, 8 * PAGE)
    driver.unmap(base, 3 * PAGE)
    driver.destroy(pages, PAGE)
    driver.release(base, 8 * PAGE)


def test_destroy_that_fails_keeps_the_rest(fake_cuda: FakeCuda, driver: Driver) -> None:
    pages = driver.create(4, PAGE)
    fake_cuda.fail("cuMemRelease", nth=3, code=OPERATING_SYSTEM)
    with pytest.raises(DriverError, match="cuMemRelease"):
        driver.destroy(pages, PAGE)
    assert driver.physical_bytes() == fake_cuda.stats().bytes_live == 2 * PAGE
    driver.destroy(pages[2:], PAGE)


def test_page_of_another_size(driver: Driver) -> None:
    base, pages = driver.reserve(4 * PAGE, PAGE), driver.create(1, PAGE)
    with pytest.raises(ValueError, match=f"created with {PAGE}"):
        driver.map(base, pages, 2 * PAGE)
    with pytest.raises(ValueError, match=f"created with {PAGE}"):
        driver.destroy(pages, 2 * PAGE)
    driver.destroy(pages, PAGE)
    driver.release(base, 4 * PAGE)


# Every call made to fail at every position.


class Script:
    """A run through the whole contract, step by step; a step that fails can be done again."""

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.base = self.stream = self.event = 0
        self.pages: list[int] = []

    def steps(self) -> list[Callable[[Driver], None]]:
        return [
            self.reserve, self.create, self.map, self.set_access, self.make_stream,
            lambda d: d.fill(self.base, 6, PAGE, self.stream),
            lambda d: d.copy(self.base + PAGE, self.base, PAGE, self.stream),
            self.record,
            lambda d: d.stream_wait(0, self.event),
            lambda d: d.wait(self.event),
            self.query,
            self.drop_event,
            lambda d: d.synchronize(self.stream),
            lambda d: d.destroy_stream(self.stream),
            lambda d: d.unmap(self.base, 4 * PAGE),
            self.destroy,
            lambda d: d.release(self.base, 4 * PAGE),
        ]  # fmt: skip

    def open(self) -> Driver:
        self.driver = make_driver("cuda_fake")
        return self.driver

    def reserve(self, driver: Driver) -> None:
        self.base = driver.reserve(4 * PAGE, PAGE)

    def create(self, driver: Driver) -> None:
        self.pages = driver.create(4, PAGE)

    def map(self, driver: Driver) -> None:
        driver.map(self.base, self.pages, PAGE)

    def set_access(self, driver: Driver) -> None:
        driver.set_access(self.base, 4 * PAGE)

    def make_stream(self, driver: Driver) -> None:
        self.stream = driver.create_stream()

    def record(self, driver: Driver) -> None:
        self.event = driver.record(self.stream)

    def query(self, driver: Driver) -> None:
        assert driver.query(self.event)

    def drop_event(self, driver: Driver) -> None:
        driver.destroy_event(self.event)

    def destroy(self, driver: Driver) -> None:
        before = driver.physical_bytes()
        try:
            driver.destroy(self.pages, PAGE)
        except DriverError:
            # From the front: what is gone is known, and the rest can be destroyed later.
            gone = (before - driver.physical_bytes()) // PAGE
            self.pages = self.pages[gone:]
            raise


def attempt(fake: FakeCuda, step: Callable[[], object], *, in_parts: bool = False) -> int:
    """Runs a step, again if it fails; returns how often it failed.

    A failure changes nothing, except `in_parts`: pages are destroyed as far as it goes.
    """
    before = fake.stats()
    try:
        step()
    except (DriverError, OutOfPages):
        after = fake.stats()
        for what in ("handles_live", "mappings_live", "reservations_live", "streams_live"):
            assert in_parts or getattr(after, what) == getattr(before, what), what
        step()
        return 1
    return 0


def run_script(fake: FakeCuda) -> tuple[int, int]:
    """The whole script: how many steps failed once, and how many calls it made.

    The calls of the driver's destructor, which cannot report a failure, do not count.
    """
    script = Script()
    failures = attempt(fake, script.open)
    driver = script.driver
    assert driver is not None
    for step in script.steps():
        failures += attempt(fake, partial(step, driver), in_parts=step == script.destroy)
    return failures, fake.total_calls()


def test_every_call_fails_once(fake_cuda: FakeCuda) -> None:
    """At every position: a typed error, nothing leaked, state unchanged, the next try works."""
    fake_cuda.configure(poison=False)
    failed, calls = run_script(fake_cuda)
    assert failed == 0
    assert calls > 60
    raised = 0
    for nth in range(1, calls + 1):
        for code in (OPERATING_SYSTEM, fk.OUT_OF_MEMORY):
            fake_cuda.reset(keep_settings=True)
            fake_cuda.fail("*", nth=nth, code=code)
            raised += run_script(fake_cuda)[0]
            assert fake_cuda.stats().failures_injected == 1
            gc.collect(0)
            assert (nth, fake_cuda.violations()) == (nth, [])
            assert (nth, fake_cuda.leaks()) == (nth, [])
    # The others were calls that put the context or the capture mode back, which cannot throw.
    assert raised > calls


# Lost contexts.


@pytest.mark.parametrize("code", [fk.ILLEGAL_ADDRESS, fk.LAUNCH_FAILED, fk.LAUNCH_TIMEOUT,
                                  fk.CONTEXT_IS_DESTROYED, fk.DEINITIALIZED, 214, 714])  # fmt: skip
def test_fatal_error_is_not_rolled_back(fake_cuda: FakeCuda, driver: Driver, code: int) -> None:
    base, pages = driver.reserve(8 * PAGE, PAGE), driver.create(8, PAGE)
    fake_cuda.reset_calls()
    fake_cuda.fail("cuMemMap", nth=3, code=code)
    error = failure_of(lambda: driver.map(base, pages, PAGE))
    assert (error.fatal, error.code) == (True, code)
    assert "restart the process" in str(error)
    assert fake_cuda.calls("cuMemUnmap") == 0
    fake_cuda.fail("cuMemCreate", nth=3, code=code)
    assert failure_of(lambda: driver.create(4, PAGE)).fatal
    assert fake_cuda.calls("cuMemRelease") == 0
    fake_cuda.reset()  # a lost context leaks


def test_lost_context(fake_cuda: FakeCuda, driver: Driver) -> None:
    run = Run(driver)
    event = driver.record(0)
    fake_cuda.sticky(fk.ILLEGAL_ADDRESS)
    calls: list[Callable[[], object]] = [
        lambda: driver.reserve(PAGE, PAGE),
        lambda: driver.create(1, PAGE),
        lambda: driver.unmap(run.base, run.bytes),
        lambda: driver.fill(run.base, 0, 1),
        lambda: driver.record(0),
        lambda: driver.query(event),
        lambda: driver.wait(event),
        lambda: driver.synchronize(),
        lambda: driver.memory_info(),
    ]
    for call in calls:
        error = failure_of(call)
        assert error.fatal
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(error)
    driver.destroy_event(event)
    fake_cuda.sticky(0)
    fake_cuda.reset()


@pytest.mark.parametrize("code", [fk.DEINITIALIZED, fk.CONTEXT_IS_DESTROYED])
def test_driver_outlives_cuda(fake_cuda: FakeCuda, code: int) -> None:
    """At exit the CUDA driver may shut down before our last object goes."""
    driver = make_driver("cuda_fake")
    driver.destroy_event(driver.record(0))
    fake_cuda.sticky(code)
    del driver
    fake_cuda.sticky(0)
    fake_cuda.reset()


def test_unmap_reports_an_earlier_kernel(fake_cuda: FakeCuda, driver: Driver, run: Run) -> None:
    fake_cuda.fail("cuMemUnmap", code=fk.ILLEGAL_ADDRESS)
    error = failure_of(lambda: driver.unmap(run.base, run.bytes))
    assert error.fatal
    assert "earlier kernel" in str(error)
