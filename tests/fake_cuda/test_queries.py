"""The fake libcuda's functions that cuda-python needs: look-up, queries, calls without a stream."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_int, c_size_t, c_void_p

import pytest

from tests.fake_cuda import driver as cu
from tests.fake_cuda import fake as fk
from tests.fake_cuda.driver import PAGE, Driver, Properties
from tests.fake_cuda.fake import FakeCuda

pytest_plugins = ("tests.fake_cuda.fixtures",)

NOT_FOUND = 500
SYMBOL_FOUND, SYMBOL_NOT_FOUND = 0, 1  # CUdriverProcAddressQueryResult


def address_of(lib: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(lib, name), c_void_p).value


@pytest.mark.parametrize(
    ("name", "exported"),
    [("cuMemMap", "cuMemMap"), ("cuMemGetInfo", "cuMemGetInfo_v2"), ("cuInit", "cuInit")],
)
def test_functions_are_found_by_name(fake: FakeCuda, name: str, exported: str) -> None:
    found, status = c_void_p(), c_int(-1)
    d = Driver(fake)
    d.ok("cuGetProcAddress_v2", name.encode(), byref(found), 13000, 0, byref(status))
    assert found.value == address_of(fake.lib, exported)
    assert status.value == SYMBOL_FOUND


def test_functions_that_are_not_there(fake: FakeCuda) -> None:
    found, status = c_void_p(1), c_int(-1)
    d = Driver(fake)
    for name in (b"cuGraphLaunch", b"cuMemGetInfo_v2", b""):
        code = d.code("cuGetProcAddress_v2", name, byref(found), 13000, 0, byref(status))
        assert (code, found.value, status.value) == (NOT_FOUND, None, SYMBOL_NOT_FOUND)
    refused: list[tuple[bytes | None, int, int, int]] = [
        (None, 13000, 0, fk.INVALID_VALUE),
        (b"cuInit", 0, 0, fk.INVALID_VALUE),
        (b"cuInit", 13000, 7, fk.INVALID_VALUE),
        (b"cuInit", 13000, 2, fk.NOT_SUPPORTED),  # per-thread default streams
    ]
    for symbol, version, flags, code in refused:
        assert d.code("cuGetProcAddress_v2", symbol, byref(found), version, flags, None) == code


def test_properties_of_a_handle(fake: FakeCuda) -> None:
    d = Driver(fake)
    d.start()
    handle, found = d.create(PAGE, device=1), Properties(win32=99)
    d.ok("cuMemGetAllocationPropertiesFromHandle", byref(found), handle)
    assert (found.type, found.location.type, found.location.id) == (1, 1, 1)
    assert (found.handle_types, found.win32) == (0, None)
    name = "cuMemGetAllocationPropertiesFromHandle"
    assert d.code(name, None, handle) == fk.INVALID_VALUE
    d.ok("cuMemRelease", handle)
    assert d.code(name, byref(found), handle) == fk.INVALID_VALUE
    d.ok("cuDevicePrimaryCtxRelease_v2", 0)


def test_range_of_an_address(fake: FakeCuda) -> None:
    d = Driver(fake)
    d.start()
    base = d.mapped(PAGE, pages=3)
    start, size = cu.Address(), c_size_t()
    d.ok("cuMemGetAddressRange_v2", byref(start), byref(size), base + PAGE + 5)
    assert (start.value, size.value) == (base + PAGE, PAGE)
    d.ok("cuMemGetAddressRange_v2", None, None, base)
    d.drop(base, 3 * PAGE)
    assert d.code("cuMemGetAddressRange_v2", byref(start), byref(size), base) == NOT_FOUND
    d.ok("cuDevicePrimaryCtxRelease_v2", 0)


def test_calls_without_a_stream(fake: FakeCuda) -> None:
    d = Driver(fake)
    d.start()
    base = d.mapped(PAGE)
    data = ctypes.create_string_buffer(b"some bytes", 10)
    d.ok("cuMemsetD8_v2", base, 1, PAGE)
    d.ok("cuMemcpyHtoD_v2", base + 3, data, 10)
    out = ctypes.create_string_buffer(14)
    d.ok("cuMemcpyDtoH_v2", out, base, 14)
    assert out.raw == b"\x01\x01\x01some bytes\x01"
    assert d.code("cuMemcpyDtoH_v2", base, base, 8) == fk.INVALID_VALUE
    d.drop(base, PAGE)
    d.ok("cuDevicePrimaryCtxRelease_v2", 0)


def test_a_copy_waits_for_the_default_stream_and_a_synchronize_for_all(fake: FakeCuda) -> None:
    d = Driver(fake)
    context = d.start()
    base, stream = d.mapped(PAGE), d.stream()
    out, done = ctypes.create_string_buffer(1), []

    def wait(name: str, *arguments: object) -> threading.Thread:
        def work() -> None:
            d.ok("cuCtxSetCurrent", context)
            d.ok(name, *arguments)
            done.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with fake.held(0):
        d.ok("cuMemsetD8Async", base, 5, PAGE, None)
        reader = wait("cuMemcpyDtoH_v2", out, base, 1)
        assert done == []
    reader.join()
    assert out.raw == b"\x05"
    with fake.held(stream):
        d.ok("cuMemsetD8Async", base, 6, PAGE, stream)
        waiter = wait("cuCtxSynchronize")
        assert fake.pending(stream) == 1
    waiter.join()
    assert done == ["cuMemcpyDtoH_v2", "cuCtxSynchronize"]
    d.ok("cuStreamDestroy_v2", stream)
    d.drop(base, PAGE)
    d.ok("cuDevicePrimaryCtxRelease_v2", 0)
