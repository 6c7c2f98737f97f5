"""What cuda-python says of memory that our driver manages: a second opinion, on the first's thread.

Nothing here goes through :mod:`vattn`: every call is one of ``cuda.bindings.driver``, which finds
the driver library by itself.
"""

from __future__ import annotations

import ctypes
from typing import Any

READWRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class CudaPythonError(RuntimeError):
    """A call of cuda-python that ought to have succeeded; ``code`` is the CUresult."""

    def __init__(self, call: str, code: Any) -> None:
        super().__init__(f"{call}: {code}")
        self.code = code


class SecondOpinion:
    """Reads, writes and queries device memory in the primary context of one device.

    The context is current in the calling thread from here to :meth:`close`, which puts back the one
    that was.

    Raises:
        CudaPythonError: no device, or a call that fails.
    """

    def __init__(self, cuda: Any, device: int = 0) -> None:
        self.cuda = cuda
        self.device = device
        self("cuInit", 0)
        self._before = self("cuCtxGetCurrent")
        self("cuCtxSetCurrent", self("cuDevicePrimaryCtxRetain", device))

    def __call__(self, name: str, *arguments: Any) -> Any:
        """What a driver function returns beside its CUresult: nothing, a value, or a tuple."""
        code, *values = getattr(self.cuda, name)(*arguments)
        if code != self.cuda.CUresult.CUDA_SUCCESS:
            raise CudaPythonError(name, code)
        return values[0] if len(values) == 1 else tuple(values)

    def close(self) -> None:
        self("cuCtxSetCurrent", self._before)
        self("cuDevicePrimaryCtxRelease", self.device)

    def _nothing_there(self, error: CudaPythonError) -> bool:
        """False, if the driver refused an address as it does where nothing is mapped."""
        if error.code != self.cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
            raise error
        return False

    # Bytes. Each call waits for everything that was given to the device before.

    def read(self, address: int, nbytes: int) -> bytes:
        out = ctypes.create_string_buffer(nbytes)
        self("cuCtxSynchronize")
        self("cuMemcpyDtoH", ctypes.addressof(out), address, nbytes)
        return out.raw

    def write(self, address: int, data: bytes) -> None:
        host = ctypes.create_string_buffer(data, len(data))
        self("cuCtxSynchronize")
        self("cuMemcpyHtoD", address, ctypes.addressof(host), len(data))
        self("cuCtxSynchronize")

    def fill(self, address: int, value: int, nbytes: int) -> None:
        self("cuCtxSynchronize")
        self("cuMemsetD8", address, value, nbytes)
        self("cuCtxSynchronize")

    # Queries. None of them touches the memory.

    def location(self, device: int | None = None) -> Any:
        location = self.cuda.CUmemLocation()
        location.type = self.cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.device if device is None else device
        return location

    def granularity(self) -> int:
        """Bytes, of pinned memory of the device."""
        properties = self.cuda.CUmemAllocationProp()
        properties.type = self.cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self.location()
        minimum = self.cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self("cuMemGetAllocationGranularity", properties, minimum))

    def mapped(self, address: int) -> bool:
        """Whether a physical allocation is behind an address, accessible or not."""
        try:
            handle = self("cuMemRetainAllocationHandle", address)
        except CudaPythonError as error:
            return self._nothing_there(error)
        self("cuMemRelease", handle)
        return True

    def accessible(self, address: int) -> bool:
        """Whether the device may read and write an address."""
        try:
            return int(self("cuMemGetAccess", self.location(), address)) == READWRITE
        except CudaPythonError as error:
            return self._nothing_there(error)

    def properties(self, address: int) -> Any:
        """The CUmemAllocationProp of what is mapped at an address."""
        handle = self("cuMemRetainAllocationHandle", address)
        try:
            return self("cuMemGetAllocationPropertiesFromHandle", handle)
        finally:
            self("cuMemRelease", handle)

    def address_range(self, address: int) -> tuple[int, int]:
        """First address and bytes of what the driver takes for one piece of memory."""
        base, nbytes = self("cuMemGetAddressRange", address)
        return int(base), int(nbytes)

    def is_device_memory(self, address: int) -> bool:
        which = self.cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        found = self("cuPointerGetAttribute", which, address)
        return int(found) == int(self.cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE)

    def ordinal(self, address: int) -> int:
        """The device on which the memory is."""
        which = self.cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(self("cuPointerGetAttribute", which, address))

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = self("cuMemGetInfo")
        return int(free), int(total)
