"""Streams and events of the fake, and the rules of the project that it watches."""

import ctypes
import threading
import time
from ctypes import byref, c_int, c_void_p

import pytest

from tests.fake_cuda import driver as cu
from tests.fake_cuda import fake as fk
from tests.fake_cuda.driver import PAGE, Driver, properties
from tests.fake_cuda.fake import FakeCuda, FakeCudaError, StreamMode

pytest_plugins = ("tests.fake_cuda.fixtures",)


def test_held_work_waits_for_the_test(drv: Driver, fake: FakeCuda) -> None:
    base, stream, event = drv.mapped(PAGE), drv.stream(), drv.event()
    assert drv.code("cuEventQuery", event) == 0  # never recorded counts as done
    fake.hold(stream)
    drv.ok("cuMemsetD8Async", base, 1, 4, stream)
    drv.ok("cuMemsetD8Async", base, 2, 4, stream)
    drv.ok("cuEventRecord", event, stream)
    assert fake.read(base, 4) == b"\xff" * 4
    assert drv.code("cuEventQuery", event) == fk.NOT_READY
    assert drv.code("cuStreamQuery", stream) == fk.NOT_READY
    assert fake.pending(stream) == 3
    assert fake.step(stream) == 1
    assert fake.read(base, 4) == b"\1" * 4
    assert fake.step(stream, 10) == 2
    assert fake.read(base, 4) == b"\2" * 4
    assert drv.code("cuEventQuery", event) == 0
    drv.ok("cuStreamSynchronize", stream)


def test_stream_wait_event_links_streams(drv: Driver, fake: FakeCuda) -> None:
    base, first, second, event = drv.mapped(PAGE), drv.stream(), drv.stream(), drv.event()
    fake.hold(first)
    drv.ok("cuMemsetD8Async", base, 1, 4, first)
    drv.ok("cuEventRecord", event, first)
    drv.ok("cuStreamWaitEvent", second, event, 0)
    drv.ok("cuMemcpyDtoDAsync_v2", base + 8, base, 4, second)
    assert fake.pending(second) == 2
    # Neither re-recording nor destroying an event changes what waits for it already.
    drv.ok("cuEventRecord", event, drv.stream())
    drv.ok("cuEventDestroy_v2", event)
    assert fake.pending(second) == 2
    fake.release(first)
    assert fake.pending(second) == 0
    assert fake.read(base + 8, 4) == b"\1" * 4


def test_the_legacy_stream_orders_blocking_streams_only(drv: Driver, fake: FakeCuda) -> None:
    base, blocking, free = drv.mapped(PAGE), drv.stream(flags=0), drv.stream()
    fake.hold(blocking)
    drv.ok("cuMemsetD8Async", base, 1, 4, blocking)
    drv.ok("cuMemsetD8Async", base, 2, 4, 0)
    drv.ok("cuMemsetD8Async", base + 8, 3, 4, free)
    assert fake.pending(0) == 1
    assert fake.read(base + 8, 4) == b"\3" * 4
    assert drv.code("cuStreamQuery", 1) == fk.NOT_READY
    fake.release(blocking)
    assert fake.read(base, 4) == b"\2" * 4


def test_synchronize_blocks_until_released(drv: Driver, fake: FakeCuda) -> None:
    stream, event = drv.stream(), drv.event()
    fake.hold(stream)
    fake.launch(stream, [])
    drv.ok("cuEventRecord", event, stream)
    timer = threading.Timer(0.1, fake.release, [stream])
    start = time.monotonic()
    timer.start()
    drv.ok("cuEventSynchronize", event)
    assert time.monotonic() - start >= 0.09
    timer.join()
    drv.ok("cuStreamSynchronize", stream)
    assert fake.violations() == []


def test_the_watchdog_ends_a_deadlock(drv: Driver, fake: FakeCuda) -> None:
    fake.configure(watchdog_ms=50)
    stream = drv.stream()
    fake.hold(stream)
    fake.launch(stream, [])
    assert drv.code("cuStreamSynchronize", stream) == fk.LAUNCH_TIMEOUT
    assert "deadlock: cuStreamSynchronize" in fake.violations()[0]


def test_lazy_streams_run_when_somebody_waits(drv: Driver, fake: FakeCuda) -> None:
    fake.configure(stream_mode=StreamMode.LAZY)
    base, first, second = drv.mapped(PAGE), drv.stream(), drv.stream()
    early, late = drv.event(), drv.event()
    drv.ok("cuMemsetD8Async", base, 1, 4, first)
    drv.ok("cuEventRecord", early, first)
    drv.ok("cuMemsetD8Async", base, 2, 4, first)
    drv.ok("cuStreamWaitEvent", second, early, 0)
    drv.ok("cuEventRecord", late, second)
    assert drv.code("cuEventQuery", late) == fk.NOT_READY
    drv.ok("cuEventSynchronize", late)
    assert fake.read(base, 4) == b"\1" * 4  # as far as needed, no further
    assert fake.pending(first) == 1
    drv.ok("cuStreamSynchronize", first)
    assert fake.read(base, 4) == b"\2" * 4


def test_pageable_copies_stage_and_wait_as_the_driver_does(drv: Driver, fake: FakeCuda) -> None:
    base, stream = drv.mapped(PAGE), drv.stream()
    fake.hold(stream)
    source = ctypes.create_string_buffer(b"old!", 4)
    drv.ok("cuMemcpyHtoDAsync_v2", base, source, 4, stream)
    source.raw = b"new!"
    pinned = drv.host_alloc(4)
    drv.ok("cuMemcpyDtoHAsync_v2", pinned, base, 4, stream)
    assert fake.pending(stream) == 2  # to pinned memory: asynchronous
    fake.release(stream)
    assert ctypes.string_at(pinned, 4) == b"old!"
    fake.hold(stream)
    back = ctypes.create_string_buffer(4)
    timer = threading.Timer(0.1, fake.release, [stream])
    timer.start()
    drv.ok("cuMemcpyDtoHAsync_v2", back, base, 4, stream)
    assert back.raw == b"old!"
    timer.join()


DEFAULT_STREAMS = [0, 1, 2]


def test_stream_and_event_handles(drv: Driver, fake: FakeCuda) -> None:
    stream, event = drv.stream(), drv.event()
    assert fake.streams() == [stream]
    for default in DEFAULT_STREAMS:
        drv.ok("cuEventRecord", event, default)
        drv.ok("cuStreamSynchronize", default)
        assert drv.code("cuStreamDestroy_v2", default) == fk.INVALID_HANDLE
    fake.hold(stream)
    fake.launch(stream, [])
    drv.ok("cuStreamDestroy_v2", stream)  # its work is still done
    assert fake.pending(stream) == 1
    fake.release(stream)
    assert drv.code("cuStreamQuery", stream) == fk.INVALID_HANDLE
    assert drv.code("cuEventRecord", event, stream) == fk.INVALID_HANDLE
    with pytest.raises(FakeCudaError, match="400"):
        fake.hold(stream)
    drv.ok("cuEventDestroy_v2", event)
    for name in ("cuEventQuery", "cuEventSynchronize", "cuEventDestroy_v2"):
        assert drv.code(name, event) == fk.INVALID_HANDLE
    assert drv.code("cuStreamCreate", byref(c_void_p()), 8) == fk.INVALID_VALUE


def test_an_event_belongs_to_its_device(drv: Driver) -> None:
    event = drv.event()
    drv.start(1)
    stream = drv.stream()
    assert drv.code("cuEventRecord", event, stream) == fk.INVALID_HANDLE
    drv.ok("cuStreamWaitEvent", stream, event, 0)


def test_capture(drv: Driver, fake: FakeCuda) -> None:
    base, stream, event = drv.mapped(PAGE), drv.stream(), drv.event()
    fake.capture(stream)
    status = c_int()
    drv.ok("cuStreamIsCapturing", stream, byref(status))
    assert status.value == 1
    unsafe = ("cuMemCreate", byref(cu.Handle()), PAGE, byref(properties()), 0)
    assert drv.code(*unsafe) == fk.STREAM_CAPTURE_UNSUPPORTED
    mode = c_int(cu.RELAXED)
    drv.ok("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == 0
    drv.ok(*unsafe)
    drv.ok("cuEventQuery", event)
    fake.launch(stream, [(base, PAGE)])
    assert fake.violations() == []
    assert drv.code("cuMemsetD8Async", base, 0, 1, stream) == fk.INVALID_VALUE
    assert "capturing" in fake.violations()[0]
    fake.capture(stream, on=False)


# Violations.


def test_unmapping_under_unfinished_work(drv: Driver, fake: FakeCuda) -> None:
    base, stream = drv.mapped(PAGE, pages=4), drv.stream()
    fake.hold(stream)
    fake.launch(stream, [(base + PAGE + 1, PAGE)], "attention")  # pages 1 and 2
    drv.unmap(base, PAGE)
    drv.unmap(base + 3 * PAGE, PAGE)
    assert fake.violations() == []
    drv.unmap(base + 2 * PAGE, PAGE)
    assert len(fake.violations()) == 1
    assert "cuMemUnmap" in fake.violations()[0]
    assert "'attention'" in fake.violations()[0]
    handle = drv.create(PAGE)
    drv.map(base + 2 * PAGE, PAGE, handle)
    assert "cuMemMap" in fake.violations()[1]
    drv.set_access(base + PAGE, PAGE)
    assert "cuMemSetAccess" in fake.violations()[2]
    fake.release(stream)
    fake.clear_violations()
    drv.unmap(base + PAGE, 2 * PAGE)
    assert fake.violations() == []


def test_queued_copies_and_memsets_are_in_use_too(drv: Driver, fake: FakeCuda) -> None:
    base, stream = drv.mapped(PAGE, pages=3), drv.stream()
    host = drv.host_alloc(PAGE)
    fake.hold(stream)
    drv.ok("cuMemcpyDtoDAsync_v2", base, base + PAGE, 8, stream)
    drv.ok("cuMemcpyHtoDAsync_v2", base + 2 * PAGE, host, 8, stream)
    for page in range(3):
        drv.unmap(base + page * PAGE, PAGE)
    drv.ok("cuMemFreeHost", host)
    assert len(fake.violations()) == 4
    fake.release(stream)  # does not crash on what is gone, and says so
    assert any("queued cuMemcpyDtoDAsync" in line for line in fake.violations())


def test_work_on_memory_without_mapping_or_access(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(4 * PAGE)
    drv.map(base, PAGE, drv.create(PAGE))
    drv.map(base + PAGE, PAGE, drv.create(PAGE))
    drv.set_access(base, PAGE)
    fake.launch(0, [(base, PAGE)])
    assert fake.violations() == []
    fake.launch(0, [(base, PAGE + 1)], "past")
    fake.launch(0, [(base + 3 * PAGE, 1)], "hole")
    assert [("access" in v, "not mapped" in v) for v in fake.violations()] == [
        (True, False),
        (False, True),
    ]
    fake.clear_violations()
    assert drv.code("cuMemsetD8Async", base, 0, 2 * PAGE, 0) == fk.INVALID_VALUE
    assert drv.code("cuMemcpyDtoDAsync_v2", base, base + PAGE, 8, 0) == fk.INVALID_VALUE
    assert drv.code("cuMemcpyDtoDAsync_v2", base, 4096, 8, 0) == fk.INVALID_VALUE
    assert len(fake.violations()) == 3


def test_access_of_another_device_does_not_count(drv: Driver, fake: FakeCuda) -> None:
    base = drv.mapped(PAGE)
    drv.start(1)
    fake.launch(drv.stream(), [(base, 1)])
    assert len(fake.violations()) == 1
    drv.set_access(base, PAGE, device=1)
    fake.launch(drv.stream(), [(base, 1)])
    assert len(fake.violations()) == 1


def test_overlapping_copy(drv: Driver, fake: FakeCuda) -> None:
    base = drv.mapped(PAGE)
    drv.ok("cuMemcpyDtoDAsync_v2", base + 4, base, 8, 0)
    assert "overlap" in fake.violations()[0]
