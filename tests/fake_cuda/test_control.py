"""What a test can do to the fake: injection, settings, counters, leaks, reset."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from ctypes import byref, c_int, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import pytest

from tests.fake_cuda import driver as cu
from tests.fake_cuda import fake as fk
from tests.fake_cuda.driver import PAGE, Driver, properties
from tests.fake_cuda.fake import LIBRARY, ROOT, FakeCuda, FakeCudaError

pytest_plugins = ("tests.fake_cuda.fixtures",)


def test_the_nth_call_fails_and_does_nothing(drv: Driver, fake: FakeCuda) -> None:
    fake.fail("cuMemCreate", nth=2, code=fk.OUT_OF_MEMORY, count=2)
    create = ("cuMemCreate", byref(cu.Handle()), PAGE, byref(properties()), 0)
    codes = [drv.code(*create) for _ in range(5)]
    assert codes == [0, fk.OUT_OF_MEMORY, fk.OUT_OF_MEMORY, 0, 0]
    stats = fake.stats()
    assert (stats.handles_live, stats.failures_injected) == (3, 2)
    assert fake.calls("cuMemCreate") == 5


def test_any_call_can_be_made_to_fail(drv: Driver, fake: FakeCuda) -> None:
    name = ctypes.c_char_p()
    fake.fail("*", nth=2, code=fk.LAUNCH_FAILED)
    drv.reserve(PAGE)
    drv.ok("cuGetErrorName", 1, byref(name))  # reads a table: never fails, never counts
    assert drv.code("cuStreamSynchronize", 0) == fk.LAUNCH_FAILED
    drv.ok("cuStreamSynchronize", 0)
    fake.fail("*", nth=1, count=0)
    assert [drv.code("cuStreamQuery", 0) for _ in range(3)] == [fk.LAUNCH_FAILED] * 3
    fake.clear_failures()
    drv.ok("cuStreamQuery", 0)


def test_sticky_errors(drv: Driver, fake: FakeCuda) -> None:
    fake.fail("cuStreamQuery", code=fk.ILLEGAL_ADDRESS, count=-1)
    drv.ok("cuStreamSynchronize", 0)
    for name in ("cuStreamQuery", "cuStreamSynchronize", "cuStreamQuery"):
        assert drv.code(name, 0) == fk.ILLEGAL_ADDRESS
    fake.sticky(0)
    fake.clear_failures()
    drv.ok("cuStreamQuery", 0)
    fake.sticky(fk.LAUNCH_FAILED)
    assert drv.code("cuInit", 0) == fk.LAUNCH_FAILED


def test_out_of_memory_after_so_many_bytes(drv: Driver, fake: FakeCuda) -> None:
    fake.configure(oom_at=2 * PAGE)
    create = ("cuMemCreate", byref(cu.Handle()), PAGE, byref(properties()), 0)
    assert [drv.code(*create) for _ in range(3)] == [0, 0, fk.OUT_OF_MEMORY]
    fake.configure(oom_at=fk.NEVER)
    drv.create(PAGE)


def test_device_memory_can_shrink_below_what_is_used(drv: Driver, fake: FakeCuda) -> None:
    drv.create(4 * PAGE)
    fake.configure(device_bytes=2 * PAGE)
    assert drv.memory_info() == (0, 2 * PAGE)
    create = ("cuMemCreate", byref(cu.Handle()), PAGE, byref(properties()), 0)
    assert drv.code(*create) == fk.OUT_OF_MEMORY
    assert drv.code("cuMemCreate", byref(cu.Handle()), PAGE, byref(properties(1)), 0) == 0


def test_latency_is_paid_by_name_and_overlaps(drv: Driver, fake: FakeCuda) -> None:
    fake.latency("cuStreamQuery", 100_000_000)
    fake.latency("cuEventQuery", 20_000)  # spun, not slept
    start = time.monotonic()
    drv.ok("cuStreamIsCapturing", 0, byref(c_int()))
    assert time.monotonic() - start < 0.05

    def query() -> None:
        drv.start()
        drv.ok("cuStreamQuery", 0)

    threads = [threading.Thread(target=query) for _ in range(4)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.1 <= time.monotonic() - start < 0.3
    event = drv.event()
    start = time.monotonic()
    drv.ok("cuEventQuery", event)
    assert time.monotonic() - start >= 20e-6


def test_bad_settings_are_refused(drv: Driver, fake: FakeCuda) -> None:
    refused = partial(pytest.raises, FakeCudaError)
    with refused(match=r"granularity\(1000,\): CUresult 1$"):
        fake.configure(granularity=1000)
    with refused(match=r"CUresult 1$"):
        fake.configure(devices=99)
    with refused(match=r"CUresult 1$"):
        fake.configure(watchdog_ms=0)
    with refused(match=r"CUresult 401$"):  # objects exist: the context
        fake.configure(granularity=4096)
    with refused(match=r"CUresult 401$"):
        fake.configure(elide=True)
    with pytest.raises(FakeCudaError):
        fake.fail("cuNoSuchCall")
    with pytest.raises(FakeCudaError):
        fake.fail("cuMemMap", nth=0)
    with pytest.raises(ValueError, match="cuNoSuchCall"):
        fake.calls("cuNoSuchCall")


# Counters, leaks, reset.


def test_counters(drv: Driver, fake: FakeCuda) -> None:
    fake.reset_calls()
    base = drv.mapped(PAGE, pages=4)
    assert fake.calls() == {
        "cuMemAddressReserve": 1,
        "cuMemCreate": 4,
        "cuMemMap": 4,
        "cuMemRelease": 4,
        "cuMemSetAccess": 1,
    }
    assert fake.total_calls() == 14
    assert fake.calls("cuMemUnmap") == 0
    drv.set_access(base, PAGE)
    drv.drop(base, 4 * PAGE)
    fake.launch(0, [])
    stats = fake.stats()
    assert (stats.bytes_live, stats.bytes_peak, stats.bytes_created) == (0, 4 * PAGE, 4 * PAGE)
    assert (stats.mappings_live, stats.mappings_peak, stats.handles_peak) == (0, 4, 4)
    assert (stats.reserved_bytes, stats.access_regrants, stats.launches) == (0, 1, 1)
    assert stats.contexts_retained == 1


def test_leaks_name_everything_that_exists(drv: Driver, fake: FakeCuda) -> None:
    base = drv.mapped(PAGE)
    handle = drv.create(PAGE)
    stream, event, host = drv.stream(), drv.event(), drv.host_alloc(1)
    words = ("reservation", "mapping", "handle", "stream", "event", "Host", "context")
    leaks = fake.leaks()
    for word in words:
        assert sum(word in line for line in leaks) == 1, (word, leaks)
    drv.drop(base, PAGE)
    drv.ok("cuMemRelease", handle)
    drv.ok("cuStreamDestroy_v2", stream)
    drv.ok("cuEventDestroy_v2", event)
    drv.ok("cuMemFreeHost", host)
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    assert fake.leaks() == []
    assert fake.reset() == []


def test_the_last_context_goes_last(drv: Driver, fake: FakeCuda) -> None:
    drv.stream()
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    assert "1 streams" in fake.violations()[0]


def test_reset_reports_and_frees(drv: Driver, fake: FakeCuda) -> None:
    drv.mapped(PAGE)
    assert len(fake.reset(keep_settings=True)) == 3  # reservation, mapping, context
    assert fake.leaks() == []
    assert drv.code("cuDeviceGetCount", byref(c_int())) == fk.NOT_INITIALIZED
    drv.ok("cuInit", 0)
    current = c_void_p(1)
    drv.ok("cuCtxGetCurrent", byref(current))
    assert current.value is None
    granularity = c_size_t()
    drv.ok("cuMemGetAllocationGranularity", byref(granularity), byref(properties()), 0)
    assert granularity.value == PAGE


def test_the_report_at_exit(tmp_path: Path, fake: FakeCuda) -> None:
    program = f"""
from tests.fake_cuda.driver import Driver
from tests.fake_cuda.fake import FakeCuda
fake = FakeCuda({str(LIBRARY)!r})
Driver(fake).start()
fake.launch(0, [(4096, 1)], "stray")
"""
    report = tmp_path / "report"
    environment = {**os.environ, "FAKE_CUDA_REPORT": str(report)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    lines = report.read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["violation", "leak"]
    assert "'stray'" in lines[0]


def test_threads(drv: Driver, fake: FakeCuda) -> None:
    """Maps, works and unmaps from several threads; run under TSan by a sanitized build."""
    fake.configure(device_bytes=1024 * PAGE)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            drv.start()
            stream, event = drv.stream(), drv.event()
            for _ in range(50):
                base = drv.mapped(PAGE, pages=2)
                drv.ok("cuMemsetD8Async", base, 5, PAGE, stream)
                drv.ok("cuMemcpyDtoDAsync_v2", base + PAGE, base, PAGE, stream)
                drv.ok("cuEventRecord", event, stream)
                drv.ok("cuEventSynchronize", event)
                assert fake.read(base + PAGE, PAGE) == b"\5" * PAGE
                drv.drop(base, 2 * PAGE)
            drv.ok("cuEventDestroy_v2", event)
            drv.ok("cuStreamDestroy_v2", stream)
            drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert fake.violations() == []
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    assert fake.leaks() == []
