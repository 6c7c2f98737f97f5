"""The calls of libcuda that the doctor makes beside those of the native driver."""

from __future__ import annotations

import ctypes
from typing import Any


class LibCuda:
    """A libcuda, initialized.

    Raises:
        OSError: the library cannot be loaded, or a call failed.
        AttributeError: it is no libcuda.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._call("cuInit", ctypes.c_uint(0))

    def version(self) -> str:
        """The newest CUDA version that the driver serves."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def device_count(self) -> int:
        """Devices that this process sees."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def name(self, device: int) -> str:
        """The product's name."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), ctypes.c_int(device))
        return name.value.decode(errors="replace")

    def attribute(self, device: int, which: int) -> int:
        """A CUdevice_attribute."""
        value = ctypes.c_int()
        self._call(
            "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), ctypes.c_int(device)
        )
        return value.value

    def read(self, address: int, size: int) -> bytes:
        """Device memory as bytes; the device's context must be current."""
        data = ctypes.create_string_buffer(size)
        self._call(
            "cuMemcpyDtoHAsync_v2",
            data,
            ctypes.c_ulonglong(address),
            ctypes.c_size_t(size),
            ctypes.c_void_p(None),
        )
        self._call("cuStreamSynchronize", ctypes.c_void_p(None))
        return data.raw

    def _call(self, function: str, *args: Any) -> None:
        code = getattr(self._library, function)(*args)
        if code != 0:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            text = name.value.decode() if name.value else str(code)
            raise OSError(f"{function} returned {text}")
