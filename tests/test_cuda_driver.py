"""The cuda driver on the fake libcuda: which calls it makes, in which context."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_void_p
from typing import TYPE_CHECKING

import pytest

from tests.cuda_run import PAGE, Run
from tests.drivers import fake_library_path, make_driver
from tests.fake_cuda import driver as cu
from vattn import DriverError, _core

if TYPE_CHECKING:
    from tests.fake_cuda.fake import FakeCuda
    from vattn._core import Driver

# What a call may do beside its own work: find and set the context and the capture mode.
GUARDS = {"cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode"}


@pytest.fixture
def driver(fake_cuda: FakeCuda) -> Driver:
    fake_cuda.configure(watchdog_ms=5000)
    return make_driver("cuda_fake")


@pytest.fixture
def run(driver: Driver) -> Iterator[Run]:
    run = Run(driver)
    yield run
    run.close()


def real_calls(fake: FakeCuda) -> dict[str, int]:
    """Calls since the last reset of the counts, but for the guards."""
    return {name: n for name, n in fake.calls().items() if name not in GUARDS}


def in_thread(work: Callable[[], object]) -> None:
    """Runs `work` in a fresh thread, one that has no context, and raises what it raises."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


# Call counts.


def test_calls_of_a_run(fake_cuda: FakeCuda, driver: Driver) -> None:
    fake_cuda.reset_calls()
    before = driver.counters()
    run = Run(driver)
    run.close()
    expected = {
        "cuMemAddressReserve": 1,
        "cuMemCreate": 8,
        "cuMemMap": 8,
        "cuMemSetAccess": 1,
        "cuMemUnmap": 1,
        "cuMemRelease": 8,
        "cuMemAddressFree": 1,
    }
    assert real_calls(fake_cuda) == expected
    counted = {op: calls - before[op][0] for op, (calls, _) in driver.counters().items()}
    assert [n for n in counted.values() if n] == [1, 1, 8, 8, 8, 1, 1]
    assert fake_cuda.stats().access_regrants == 0


def test_steady_state_makes_no_events(fake_cuda: FakeCuda, driver: Driver) -> None:
    stream = driver.create_stream()
    driver.destroy_event(driver.record(stream))
    fake_cuda.reset_calls()
    for _ in range(100):
        event = driver.record(stream)
        driver.stream_wait(0, event)
        driver.wait(event)
        driver.destroy_event(event)
    calls = {"cuEventRecord": 100, "cuStreamWaitEvent": 100, "cuEventSynchronize": 100}
    assert real_calls(fake_cuda) == calls
    driver.destroy_stream(stream)


def test_few_events_are_kept(fake_cuda: FakeCuda, driver: Driver) -> None:
    events = [driver.record(0) for _ in range(1000)]
    assert len(set(events)) == 1000
    for event in events:
        driver.destroy_event(event)
    assert 1 <= fake_cuda.stats().events_live <= 256


def test_the_driver_gives_everything_back(fake_cuda: FakeCuda) -> None:
    driver = make_driver("cuda_fake")
    Run(driver).close()
    driver.destroy_event(driver.record(0))
    assert fake_cuda.leaks() != []
    del driver
    assert fake_cuda.leaks() == []


# Events and held streams.


def test_query_and_wait_follow_the_device(fake_cuda: FakeCuda, driver: Driver, run: Run) -> None:
    stream = driver.create_stream()
    waited = threading.Event()
    with fake_cuda.held(stream):
        driver.fill(run.base, 1, PAGE, stream)
        event = driver.record(stream)
        assert not driver.query(event)

        def wait() -> None:
            driver.wait(event)
            waited.set()

        # The wait leaves the GIL to this thread, or the release below would never come.
        thread = threading.Thread(target=wait)
        thread.start()
        assert not waited.wait(0.05)
    thread.join()
    assert driver.query(event)
    driver.destroy_event(event)
    driver.destroy_stream(stream)


def test_stream_wait_blocks_the_stream_only(fake_cuda: FakeCuda, driver: Driver, run: Run) -> None:
    first, second = driver.create_stream(), driver.create_stream()
    driver.fill(run.base, 0, 2 * PAGE)
    driver.synchronize()
    with fake_cuda.held(first):
        driver.fill(run.base, 4, PAGE, first)
        event = driver.record(first)
        driver.stream_wait(second, event)
        driver.copy(run.base + PAGE, run.base, PAGE, second)
        # Given back while in use, and recorded anew elsewhere: the wait is for the first record.
        driver.destroy_event(event)
        again = driver.record(0)
        assert again == event
        assert driver.query(again)
        assert fake_cuda.pending(second) > 0
        assert fake_cuda.read(run.base + PAGE, 4) == bytes(4)
    driver.synchronize(second)
    assert fake_cuda.read(run.base + PAGE, 4) == b"\x04" * 4
    driver.destroy_event(again)
    for stream in (first, second):
        driver.destroy_stream(stream)


# Contexts and captures.


def current_context(raw: cu.Driver) -> int | None:
    context = c_void_p()
    raw.ok("cuCtxGetCurrent", byref(context))
    return context.value


def test_context_is_current_in_every_thread(driver: Driver) -> None:
    def work() -> None:
        driver.memory_info()
        run = Run(driver)
        driver.fill(run.base, 1, 64)
        event = driver.record(0)
        driver.wait(event)
        driver.destroy_event(event)
        driver.synchronize()
        run.close()

    in_thread(work)


def test_context_of_others_is_put_back(fake_cuda: FakeCuda, driver: Driver) -> None:
    raw = cu.Driver(fake_cuda)

    def work() -> None:
        other = raw.start(device=1)
        run = Run(driver)
        driver.fill(run.base, 1, 64)
        driver.synchronize()
        run.close()
        with pytest.raises(ValueError, match="reserve it first"):
            driver.unmap(run.base, PAGE)
        assert current_context(raw) == other
        raw.ok("cuDevicePrimaryCtxRelease_v2", 1)

    in_thread(work)


def test_context_that_died_does_no_harm(fake_cuda: FakeCuda, driver: Driver) -> None:
    """A thread may still have a context current that somebody destroyed."""
    raw = cu.Driver(fake_cuda)

    def work() -> None:
        raw.start(device=1)
        raw.ok("cuDevicePrimaryCtxRelease_v2", 1)
        Run(driver).close()
        assert driver.memory_info()[0] > 0

    in_thread(work)


def test_no_dead_context_is_left_behind(fake_cuda: FakeCuda) -> None:
    raw = cu.Driver(fake_cuda)

    def work() -> None:
        driver = make_driver("cuda_fake")
        driver.memory_info()
        assert current_context(raw) is not None
        del driver
        assert current_context(raw) is None
        second = _core.cuda_driver(device=1, libcuda=str(fake_library_path()))
        assert second.memory_info()[0] > 0
        assert second.name() == "cuda:1"

    in_thread(work)


def test_a_capture_does_not_stop_memory_management(fake_cuda: FakeCuda, driver: Driver) -> None:
    raw = cu.Driver(fake_cuda)
    stream, other = driver.create_stream(), driver.create_stream()
    event = driver.record(other)
    mode_before = c_int(1)  # thread-local, which is not the default
    raw.ok("cuThreadExchangeStreamCaptureMode", byref(mode_before))
    fake_cuda.capture(stream)
    run = Run(driver)
    assert driver.query(event)
    driver.wait(event)
    driver.memory_info()
    run.close()
    fake_cuda.capture(stream, False)
    mode_after = c_int(mode_before.value)
    raw.ok("cuThreadExchangeStreamCaptureMode", byref(mode_after))
    assert mode_after.value == 1
    driver.destroy_event(event)
    for each in (stream, other):
        driver.destroy_stream(each)


# Opening.


def test_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriverError, match=r"no_such_lib.*VATTN_LIBCUDA"):
        _core.cuda_driver(libcuda="/no_such_lib.so")
    monkeypatch.setenv("VATTN_LIBCUDA", "/from_the_environment.so")
    with pytest.raises(DriverError, match="from_the_environment"):
        _core.cuda_driver()


def test_library_from_the_environment(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VATTN_LIBCUDA", str(fake_library_path()))
    driver = _core.cuda_driver(device=1)
    assert driver.name() == "cuda:1"
    assert driver.dlpack_device() == (2, 1)  # the CPU's only if asked for
    assert fake_cuda.calls("cuInit") == 1


def test_library_without_the_functions() -> None:
    with pytest.raises(DriverError, match=r"libc.so.6 has no function cuInit.*update"):
        _core.cuda_driver(libcuda="libc.so.6")


@pytest.mark.parametrize("device", [-1, 2, 99])
def test_device_that_does_not_exist(fake_cuda: FakeCuda, device: int) -> None:
    with pytest.raises(ValueError, match=rf"no CUDA device {device}: this process sees 2"):
        _core.cuda_driver(device=device, libcuda=str(fake_library_path()))
    assert fake_cuda.leaks() == []


def test_no_device(fake_cuda: FakeCuda) -> None:
    fake_cuda.fail("cuInit", code=100)
    with pytest.raises(DriverError, match=r"CUDA_ERROR_NO_DEVICE.*CUDA_VISIBLE_DEVICES"):
        make_driver("cuda_fake")
