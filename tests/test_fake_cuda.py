"""The fake libcuda: contexts, virtual memory management, allocations and copies.

Streams and violations are in `fake_cuda/test_streams.py`, injection, counters and leaks in
`fake_cuda/test_control.py`.
"""

import ctypes
import subprocess
import sys
import threading
from ctypes import byref, c_char_p, c_int, c_size_t, c_ulonglong, c_void_p

import pytest

from tests.fake_cuda import driver as cu
from tests.fake_cuda import fake as fk
from tests.fake_cuda.driver import (
    DEVICE_BYTES,
    PAGE,
    Access,
    Driver,
    Location,
    Properties,
    properties,
)
from tests.fake_cuda.fake import LIBRARY, ROOT, FakeCuda, FakeCudaError

pytest_plugins = ("tests.fake_cuda.fixtures",)


# Initialization, devices and contexts.


def test_every_call_needs_init_first(fake: FakeCuda) -> None:
    d = Driver(fake)
    no_init = {
        "cuDeviceGetCount": (byref(c_int()),),
        "cuDevicePrimaryCtxRetain": (byref(c_void_p()), 0),
        "cuCtxGetCurrent": (byref(c_void_p()),),
        "cuMemAddressReserve": (byref(cu.Address()), PAGE, 0, 0, 0),
        "cuMemCreate": (byref(cu.Handle()), PAGE, byref(properties()), 0),
        "cuMemMap": (PAGE, PAGE, 0, 1, 0),
        "cuStreamCreate": (byref(c_void_p()), 0),
        "cuEventQuery": (1,),
        "cuMemGetInfo_v2": (byref(c_size_t()), byref(c_size_t())),
    }
    for name, arguments in no_init.items():
        assert d.code(name, *arguments) == fk.NOT_INITIALIZED, name
    assert d.code("cuInit", 1) == fk.INVALID_VALUE
    version = c_int()
    d.ok("cuDriverGetVersion", byref(version))
    assert version.value >= 12000


def test_calls_that_need_a_context_say_so(fake: FakeCuda) -> None:
    d = Driver(fake)
    d.ok("cuInit", 0)
    need_context = {
        "cuMemGetInfo_v2": (byref(c_size_t()), byref(c_size_t())),
        "cuMemAlloc_v2": (byref(cu.Address()), PAGE),
        "cuStreamCreate": (byref(c_void_p()), 0),
        "cuStreamSynchronize": (0,),
        "cuEventCreate": (byref(c_void_p()), 0),
        "cuMemsetD8Async": (PAGE, 0, PAGE, 0),
    }
    for name, arguments in need_context.items():
        assert d.code(name, *arguments) == fk.INVALID_CONTEXT, name
    # Virtual memory management names its devices and needs no context.
    base = d.reserve(PAGE)
    handle = d.create(PAGE)
    d.map(base, PAGE, handle)
    d.set_access(base, PAGE)
    d.drop(base, PAGE)
    d.ok("cuMemRelease", handle)
    assert fake.leaks() == []


def test_contexts_are_counted_and_belong_to_threads(drv: Driver, fake: FakeCuda) -> None:
    seen: list[int] = []
    free, total = c_size_t(), c_size_t()
    thread = threading.Thread(
        target=lambda: seen.append(drv.code("cuMemGetInfo_v2", byref(free), byref(total)))
    )
    thread.start()
    thread.join()
    assert seen == [fk.INVALID_CONTEXT]
    again = drv.start()
    current = c_void_p()
    drv.ok("cuCtxGetCurrent", byref(current))
    assert current.value == again
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    drv.memory_info()
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    assert drv.code("cuMemGetInfo_v2", byref(free), byref(total)) == fk.CONTEXT_IS_DESTROYED
    assert drv.code("cuDevicePrimaryCtxRelease_v2", 0) == fk.INVALID_CONTEXT
    assert drv.code("cuCtxSetCurrent", again) == fk.INVALID_CONTEXT
    assert drv.code("cuCtxSetCurrent", 12345) == fk.INVALID_CONTEXT
    drv.ok("cuCtxSetCurrent", None)
    assert fake.leaks() == []


def test_devices(drv: Driver) -> None:
    value = c_int()
    drv.ok("cuDeviceGetCount", byref(value))
    assert value.value == 2
    for attribute, expected in {102: 1, 75: 9, 76: 0}.items():  # VMM, compute capability
        drv.ok("cuDeviceGetAttribute", byref(value), attribute, 1)
        assert value.value == expected
    name = ctypes.create_string_buffer(64)
    drv.ok("cuDeviceGetName", name, 64, 1)
    assert b"Fake" in name.value
    assert drv.code("cuDeviceGet", byref(value), 2) == fk.INVALID_DEVICE
    assert drv.code("cuDevicePrimaryCtxRetain", byref(c_void_p()), 2) == fk.INVALID_DEVICE


def test_error_names(drv: Driver) -> None:
    text = c_char_p()
    drv.ok("cuGetErrorName", fk.OUT_OF_MEMORY, byref(text))
    assert text.value == b"CUDA_ERROR_OUT_OF_MEMORY"
    drv.ok("cuGetErrorString", fk.OUT_OF_MEMORY, byref(text))
    assert text.value == b"out of memory"
    assert drv.code("cuGetErrorName", 12345, byref(text)) == fk.INVALID_VALUE
    assert text.value is None


# Virtual memory management: what CUDA refuses.


@pytest.mark.parametrize(
    ("size", "alignment", "hint", "flags"),
    [
        (0, 0, 0, 0),
        (PAGE + 4096, 0, 0, 0),
        (PAGE, 3 * PAGE, 0, 0),
        (PAGE, PAGE // 2, 0, 0),
        (PAGE, 0, 1, 0),
        (PAGE, 0, 0, 1),
    ],
)
def test_bad_reserve(drv: Driver, size: int, alignment: int, hint: int, flags: int) -> None:
    out = cu.Address()
    code = drv.code("cuMemAddressReserve", byref(out), size, alignment, hint, flags)
    assert code == fk.INVALID_VALUE


def test_reserve_honours_alignment_and_hint(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(PAGE, 64 * PAGE)
    assert base % (64 * PAGE) == 0
    drv.ok("cuMemAddressFree", base, PAGE)
    out = cu.Address()
    drv.ok("cuMemAddressReserve", byref(out), PAGE, 0, base, 0)
    assert out.value == base
    drv.ok("cuMemAddressReserve", byref(out), PAGE, 0, base, 0)
    assert out.value != base  # taken: a hint is only a hint
    assert fake.stats().reserved_bytes == 2 * PAGE


def test_a_terabyte_can_be_reserved(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(1 << 40)
    assert fake.stats().physical_bytes == 0
    drv.ok("cuMemAddressFree", base, 1 << 40)


@pytest.mark.parametrize(
    ("size", "prop", "code"),
    [
        (0, properties(), fk.INVALID_VALUE),
        (PAGE + 4096, properties(), fk.INVALID_VALUE),
        (PAGE, Properties(type=0, location=Location(1, 0)), fk.INVALID_VALUE),
        (PAGE, Properties(type=1, location=Location(0, 0)), fk.INVALID_VALUE),
        (PAGE, properties(7), fk.INVALID_DEVICE),
        (PAGE, Properties(type=1, location=Location(1, 0), handle_types=1), fk.NOT_SUPPORTED),
        (DEVICE_BYTES + PAGE, properties(), fk.OUT_OF_MEMORY),
    ],
)
def test_bad_create(drv: Driver, size: int, prop: Properties, code: int) -> None:
    assert drv.code("cuMemCreate", byref(cu.Handle()), size, byref(prop), 0) == code


def test_bad_free_of_addresses(drv: Driver) -> None:
    base = drv.reserve(4 * PAGE)
    handle = drv.create(PAGE)
    for address, size in ((base, 2 * PAGE), (base + PAGE, 3 * PAGE), (base, 8 * PAGE), (0, PAGE)):
        assert drv.code("cuMemAddressFree", address, size) == fk.INVALID_VALUE
    drv.map(base + PAGE, PAGE, handle)
    assert drv.code("cuMemAddressFree", base, 4 * PAGE) == fk.INVALID_VALUE
    drv.unmap(base + PAGE, PAGE)
    drv.ok("cuMemAddressFree", base, 4 * PAGE)
    assert drv.code("cuMemAddressFree", base, 4 * PAGE) == fk.INVALID_VALUE


def test_bad_map(drv: Driver) -> None:
    base = drv.reserve(8 * PAGE)
    big, small = drv.create(2 * PAGE), drv.create(PAGE)
    drv.map(base + 2 * PAGE, 2 * PAGE, big)
    bad = {
        "offset": (base, PAGE, PAGE, big, 0),
        "flags": (base, PAGE, 0, small, 1),
        "address off the granularity": (base + 4096, PAGE, 0, small, 0),
        "size off the granularity": (base, 4096, 0, small, 0),
        "nothing": (base, 0, 0, small, 0),
        "more than the handle": (base, 2 * PAGE, 0, small, 0),
        "outside the reservation": (base + 7 * PAGE, 2 * PAGE, 0, big, 0),
        "not reserved": (PAGE, PAGE, 0, small, 0),
        "double map": (base + 2 * PAGE, 2 * PAGE, 0, big, 0),
        "overlap from the left": (base + PAGE, 2 * PAGE, 0, big, 0),
        "overlap inside": (base + 3 * PAGE, PAGE, 0, small, 0),
        "unknown handle": (base, PAGE, 0, small + 1, 0),
    }
    for what, arguments in bad.items():
        assert drv.code("cuMemMap", *arguments) == fk.INVALID_VALUE, what
    drv.ok("cuMemRelease", small)
    assert drv.code("cuMemMap", base, PAGE, 0, small, 0) == fk.INVALID_VALUE
    drv.ok("cuMemRelease", big)  # still mapped, but no longer a handle to map
    assert drv.code("cuMemMap", base, 2 * PAGE, 0, big, 0) == fk.INVALID_VALUE
    assert drv.code("cuMemRelease", big) == fk.INVALID_VALUE
    assert drv.code("cuMemRelease", small) == fk.INVALID_VALUE


def test_unmap_and_set_access_take_whole_mappings(drv: Driver) -> None:
    base = drv.reserve(8 * PAGE)
    handle = drv.create(2 * PAGE)
    for at in (0, 2, 6):  # [0 1][2 3] hole [6 7]
        drv.map(base + at * PAGE, 2 * PAGE, handle)
    bad = {
        "front half": (0, 1),
        "back half": (1, 1),
        "one and a half": (0, 3),
        "only a hole": (4, 2),
        "over a hole": (2, 6),
        "into a hole": (2, 3),
        "nothing": (0, 0),
        "beyond the end": (6, 3),
    }
    for what, (at, pages) in bad.items():
        address, size = base + at * PAGE, pages * PAGE
        assert drv.code("cuMemUnmap", address, size) == fk.INVALID_VALUE, what
        assert drv.access_code(address, size) == fk.INVALID_VALUE, what
    assert drv.code("cuMemUnmap", base, PAGE + 1) == fk.INVALID_VALUE
    drv.set_access(base, 4 * PAGE)
    drv.unmap(base, 4 * PAGE)
    drv.unmap(base + 6 * PAGE, 2 * PAGE)
    assert drv.code("cuMemUnmap", base, 4 * PAGE) == fk.INVALID_VALUE


def test_bad_access(drv: Driver) -> None:
    base = drv.mapped(PAGE)
    assert drv.access_code(base, PAGE, device=2) == fk.INVALID_DEVICE
    assert drv.access_code(base, PAGE, flags=2) == fk.INVALID_VALUE
    host = Access(Location(2, 0), cu.READWRITE)
    assert drv.code("cuMemSetAccess", base, PAGE, byref(host), 1) == fk.INVALID_VALUE
    assert drv.code("cuMemSetAccess", base, PAGE, None, 0) == fk.INVALID_VALUE


def test_granularity(drv: Driver) -> None:
    out = c_size_t()
    for option in (0, 1):
        drv.ok("cuMemGetAllocationGranularity", byref(out), byref(properties()), option)
        assert out.value == PAGE
    bad = drv.code("cuMemGetAllocationGranularity", byref(out), byref(properties()), 2)
    assert bad == fk.INVALID_VALUE


# Virtual memory management: what CUDA allows.


def test_aliases_show_the_same_bytes(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(4 * PAGE)
    handle = drv.create(PAGE)
    for page in (0, 2):
        drv.map(base + page * PAGE, PAGE, handle)
        drv.set_access(base + page * PAGE, PAGE)
    fake.write(base + 10, b"hello")
    assert fake.read(base + 2 * PAGE + 10, 5) == b"hello"
    drv.ok("cuMemsetD8Async", base + 2 * PAGE, 7, PAGE, 0)
    assert fake.read(base, PAGE) == b"\7" * PAGE
    assert fake.stats().bytes_live == PAGE


def test_a_released_handle_lives_until_its_last_unmap(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(2 * PAGE)
    handle = drv.create(PAGE)
    drv.map(base, PAGE, handle)
    drv.map(base + PAGE, PAGE, handle)
    drv.set_access(base, 2 * PAGE)
    drv.ok("cuMemRelease", handle)
    fake.write(base, b"x")
    drv.unmap(base, PAGE)
    assert fake.read(base + PAGE, 1) == b"x"
    assert fake.stats().handles_live == 1
    assert drv.memory_info() == (DEVICE_BYTES - PAGE, DEVICE_BYTES)
    drv.unmap(base + PAGE, PAGE)
    assert fake.stats().handles_live == 0
    assert drv.memory_info() == (DEVICE_BYTES, DEVICE_BYTES)


def test_retain_gives_the_same_handle(drv: Driver) -> None:
    base = drv.reserve(PAGE)
    handle = drv.create(PAGE)
    drv.map(base, PAGE, handle)
    drv.ok("cuMemRelease", handle)
    out = cu.Handle()
    drv.ok("cuMemRetainAllocationHandle", byref(out), base + 100)
    assert out.value == handle
    drv.unmap(base, PAGE)
    drv.ok("cuMemRelease", handle)
    assert drv.code("cuMemRelease", handle) == fk.INVALID_VALUE
    assert drv.code("cuMemRetainAllocationHandle", byref(out), base) == fk.INVALID_VALUE


def test_access_is_by_device_and_starts_at_none(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(PAGE)
    drv.map(base, PAGE, drv.create(PAGE))
    flags = c_ulonglong(9)

    def rights() -> list[int]:
        found = []
        for device in (0, 1):
            drv.ok("cuMemGetAccess", byref(flags), byref(Location(1, device)), base)
            found.append(flags.value)
        return found

    assert rights() == [cu.NONE, cu.NONE]
    with pytest.raises(FakeCudaError, match="700"):
        fake.read(base, 1)
    drv.set_access(base, PAGE, cu.READ, device=1)
    assert rights() == [cu.NONE, cu.READ]
    fake.read(base, 1)
    with pytest.raises(FakeCudaError, match="700"):
        fake.write(base, b"x")
    drv.unmap(base, PAGE)
    location = byref(Location(1, 0))
    assert drv.code("cuMemGetAccess", byref(flags), location, base) == fk.INVALID_VALUE


def test_a_new_mapping_starts_without_access(drv: Driver, fake: FakeCuda) -> None:
    base = drv.reserve(PAGE)
    handle = drv.create(PAGE)
    drv.map(base, PAGE, handle)
    drv.set_access(base, PAGE)
    fake.read(base, 1)
    drv.unmap(base, PAGE)
    drv.map(base, PAGE, handle)
    with pytest.raises(FakeCudaError):
        fake.read(base, 1)


@pytest.mark.parametrize("state", ["reserved", "mapped", "unmapped"])
def test_the_cpu_faults_without_access(state: str, fake: FakeCuda) -> None:
    program = f"""
import ctypes
from tests.fake_cuda.driver import Driver
from tests.fake_cuda.fake import FakeCuda
fake = FakeCuda({str(LIBRARY)!r})
fake.configure(granularity={PAGE})
d = Driver(fake)
d.start()
base = d.reserve({PAGE})
if {state!r} != "reserved":
    d.map(base, {PAGE}, d.create({PAGE}))
if {state!r} == "unmapped":
    d.set_access(base, {PAGE})
    ctypes.string_at(base, 1)
    d.unmap(base, {PAGE})
print("ready", flush=True)
ctypes.string_at(base, 1)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "ready\n", result.stderr
    assert result.returncode != 0  # SIGSEGV, which a sanitizer turns into an exit


def test_fresh_memory_is_poisoned_or_zero(drv: Driver, fake: FakeCuda) -> None:
    assert fake.read(drv.mapped(PAGE), PAGE) == b"\xff" * PAGE
    fake.configure(poison=False)
    assert fake.read(drv.mapped(PAGE), PAGE) == b"\0" * PAGE


def test_destroyed_memory_goes_back_to_the_host(drv: Driver, fake: FakeCuda) -> None:
    base = drv.mapped(PAGE, pages=8)
    assert fake.stats().physical_bytes == 8 * PAGE
    drv.unmap(base, 4 * PAGE)
    assert fake.stats().physical_bytes == 4 * PAGE
    drv.unmap(base + 4 * PAGE, 4 * PAGE)
    assert fake.stats().physical_bytes == 0


def test_elide_keeps_accounts_only(fake: FakeCuda) -> None:
    fake.configure(elide=True, device_bytes=1 << 42)
    d = Driver(fake)
    d.start()
    base = d.mapped(1 << 40)
    d.ok("cuMemsetD8Async", base, 0, 1 << 30, 0)
    d.ok("cuMemcpyDtoDAsync_v2", base + (1 << 39), base, 1 << 38, 0)
    stats = fake.stats()
    assert (stats.bytes_live, stats.physical_bytes) == (1 << 40, 0)
    assert (stats.memset_bytes, stats.copied_bytes) == (1 << 30, 1 << 38)
    with pytest.raises(FakeCudaError, match="801"):
        fake.read(base, 1)
    assert d.code("cuMemUnmap", base, 1 << 39) == fk.INVALID_VALUE
    d.drop(base, 1 << 40)


# Ordinary memory.


def test_device_and_host_allocations(drv: Driver, fake: FakeCuda) -> None:
    out = cu.Address()
    drv.ok("cuMemAlloc_v2", byref(out), 1000)
    fake.write(out.value, b"abc")
    value = c_int()
    drv.ok("cuPointerGetAttribute", byref(value), 2, out.value)  # memory type
    assert value.value == 2
    assert drv.code("cuMemUnmap", out.value, PAGE) == fk.INVALID_VALUE
    assert drv.code("cuMemAddressFree", out.value, 4096) == fk.INVALID_VALUE
    drv.ok("cuMemFree_v2", out.value)
    assert drv.code("cuMemFree_v2", out.value) == fk.INVALID_VALUE
    assert drv.code("cuPointerGetAttribute", byref(value), 2, out.value) == fk.INVALID_VALUE
    drv.ok("cuMemFree_v2", 0)
    assert drv.code("cuMemAlloc_v2", byref(out), DEVICE_BYTES + 1) == fk.OUT_OF_MEMORY
    host = drv.host_alloc(100)
    drv.ok("cuPointerGetAttribute", byref(value), 2, host)
    assert value.value == 1
    drv.ok("cuMemFreeHost", host)
    assert drv.code("cuMemFreeHost", host) == fk.INVALID_VALUE
    drv.ok("cuDevicePrimaryCtxRelease_v2", 0)
    assert fake.leaks() == []


def test_copies_in_all_directions(drv: Driver, fake: FakeCuda) -> None:
    base = drv.mapped(PAGE, pages=2)
    data, back = b"0123456789", ctypes.create_string_buffer(10)
    drv.ok("cuMemcpyHtoDAsync_v2", base, data, 10, 0)
    drv.ok("cuMemcpyDtoDAsync_v2", base + PAGE, base, 10, 0)
    drv.ok("cuMemcpyAsync", base + 20, base + PAGE, 10, 0)
    drv.ok("cuMemcpyDtoHAsync_v2", back, base + 20, 10, 0)
    assert back.raw == data
    assert fake.violations() == []
    assert fake.stats().copied_bytes == 40
    # A device pointer where a host pointer belongs.
    assert drv.code("cuMemcpyHtoDAsync_v2", base, base + PAGE, 10, 0) == fk.INVALID_VALUE
