"""Driver calls as plain Python, for tests of the fake itself."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_int,
    c_size_t,
    c_ubyte,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fake_cuda.fake import FakeCuda

Address = c_ulonglong  # CUdeviceptr
Handle = c_ulonglong  # CUmemGenericAllocationHandle

PAGE = 64 * 1024  # the granularity that the tests of the fake set
DEVICE_BYTES = 64 * PAGE

NONE, READ, READWRITE = 0, 1, 3  # CUmemAccess_flags
NON_BLOCKING = 1  # CUstream_flags
RELAXED = 2  # CUstreamCaptureMode


class Location(Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class AllocFlags(Structure):
    _fields_ = [
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class Properties(Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", AllocFlags),
    ]


class Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", c_int)]


# By exported name: what dlsym finds is what counts.
_ARGUMENTS: dict[str, list[object]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetProcAddress_v2": [
        ctypes.c_char_p,
        POINTER(c_void_p),
        c_int,
        c_ulonglong,
        POINTER(c_int),
    ],
    "cuGetErrorName": [c_int, POINTER(ctypes.c_char_p)],
    "cuGetErrorString": [c_int, POINTER(ctypes.c_char_p)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [ctypes.c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxSynchronize": [],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(Properties), c_int],
    "cuMemAddressReserve": [POINTER(Address), c_size_t, c_size_t, Address, c_ulonglong],
    "cuMemAddressFree": [Address, c_size_t],
    "cuMemCreate": [POINTER(Handle), c_size_t, POINTER(Properties), c_ulonglong],
    "cuMemRelease": [Handle],
    "cuMemRetainAllocationHandle": [POINTER(Handle), c_void_p],
    "cuMemGetAllocationPropertiesFromHandle": [POINTER(Properties), Handle],
    "cuMemGetAddressRange_v2": [POINTER(Address), POINTER(c_size_t), Address],
    "cuMemMap": [Address, c_size_t, c_size_t, Handle, c_ulonglong],
    "cuMemUnmap": [Address, c_size_t],
    "cuMemSetAccess": [Address, c_size_t, POINTER(Access), c_size_t],
    "cuMemGetAccess": [POINTER(c_ulonglong), POINTER(Location), Address],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(Address), c_size_t],
    "cuMemFree_v2": [Address],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, Address],
    "cuMemcpyDtoDAsync_v2": [Address, Address, c_size_t, c_void_p],
    "cuMemcpyHtoDAsync_v2": [Address, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, Address, c_size_t, c_void_p],
    "cuMemcpyAsync": [Address, Address, c_size_t, c_void_p],
    "cuMemsetD8Async": [Address, c_ubyte, c_size_t, c_void_p],
    "cuMemcpyHtoD_v2": [Address, c_void_p, c_size_t],
    "cuMemcpyDtoH_v2": [c_void_p, Address, c_size_t],
    "cuMemsetD8_v2": [Address, c_ubyte, c_size_t],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamQuery": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuStreamIsCapturing": [c_void_p, POINTER(c_int)],
    "cuThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
}


def properties(device: int = 0) -> Properties:
    """Pinned memory of `device`."""
    return Properties(type=1, location=Location(1, device))


class Driver:
    """`code` calls a function and returns its CUresult; the rest must succeed."""

    def __init__(self, fake: FakeCuda) -> None:
        self._lib = fake.lib
        for name, arguments in _ARGUMENTS.items():
            function = getattr(fake.lib, name)
            function.restype = c_int
            function.argtypes = arguments

    def code(self, name: str, *arguments: object) -> int:
        return int(getattr(self._lib, name)(*arguments))

    def ok(self, name: str, *arguments: object) -> None:
        assert self.code(name, *arguments) == 0, (name, arguments)

    def start(self, device: int = 0) -> int:
        """CuInit, and the device's primary context made current; returns the context."""
        self.ok("cuInit", 0)
        context = c_void_p()
        self.ok("cuDevicePrimaryCtxRetain", byref(context), device)
        self.ok("cuCtxSetCurrent", context)
        return int(context.value or 0)

    def reserve(self, size: int, alignment: int = 0) -> int:
        address = Address()
        self.ok("cuMemAddressReserve", byref(address), size, alignment, 0, 0)
        return address.value

    def create(self, size: int, device: int = 0) -> int:
        handle = Handle()
        self.ok("cuMemCreate", byref(handle), size, byref(properties(device)), 0)
        return handle.value

    def map(self, address: int, size: int, handle: int) -> None:
        self.ok("cuMemMap", address, size, 0, handle, 0)

    def access_code(self, address: int, size: int, flags: int = READWRITE, device: int = 0) -> int:
        return self.code(
            "cuMemSetAccess", address, size, byref(Access(Location(1, device), flags)), 1
        )

    def set_access(self, address: int, size: int, flags: int = READWRITE, device: int = 0) -> None:
        assert self.access_code(address, size, flags, device) == 0

    def mapped(self, size: int, pages: int = 1) -> int:
        """`pages` fresh mappings of `size` bytes side by side, with access."""
        base = self.reserve(size * pages)
        for page in range(pages):
            handle = self.create(size)
            self.map(base + page * size, size, handle)
            self.ok("cuMemRelease", handle)
        self.set_access(base, size * pages)
        return base

    def unmap(self, address: int, size: int) -> None:
        self.ok("cuMemUnmap", address, size)

    def drop(self, address: int, size: int) -> None:
        """Undoes `mapped`."""
        self.unmap(address, size)
        self.ok("cuMemAddressFree", address, size)

    def stream(self, flags: int = NON_BLOCKING) -> int:
        stream = c_void_p()
        self.ok("cuStreamCreate", byref(stream), flags)
        return int(stream.value or 0)

    def event(self) -> int:
        event = c_void_p()
        self.ok("cuEventCreate", byref(event), 2)
        return int(event.value or 0)

    def host_alloc(self, size: int) -> int:
        address = c_void_p()
        self.ok("cuMemHostAlloc", byref(address), size, 0)
        return int(address.value or 0)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = c_size_t(), c_size_t()
        self.ok("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value
