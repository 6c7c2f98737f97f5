"""The drivers that the contract suite runs on, and a way to see the bytes behind each."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.fake_cuda.fake import BUILD_COMMAND, LIBRARY
from vattn import _core

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fake_cuda.fake import FakeCuda

# "cuda_fake" is the cuda driver on the fake libcuda, "cuda" the same on a GPU's.
DRIVERS = ("host", "host_strict", "cuda_fake", "cuda")
REAL_LIBCUDA = "libcuda.so.1"


def fake_library_path() -> Path:
    """The fake libcuda; a test that needs it fails, with the command, if it is not built."""
    if not LIBRARY.exists():
        pytest.fail(f"{LIBRARY} is not built; run `{BUILD_COMMAND}`")
    return LIBRARY


@functools.cache
def cuda_missing_reason() -> str | None:
    """Why there is no GPU for tests here; None if there is one."""
    try:
        _core.cuda_driver(libcuda=REAL_LIBCUDA)
    except _core.DriverError as error:
        return f"no CUDA device: {error}"
    return None


def make_driver(kind: str) -> _core.Driver:
    """A new driver of one of the DRIVERS."""
    if kind == "cuda_fake":
        return _core.cuda_driver(libcuda=str(fake_library_path()), host_accessible=True)
    if kind == "cuda":
        return _core.cuda_driver(libcuda=REAL_LIBCUDA)
    return _core.host_driver(strict=kind == "host_strict")


@dataclass
class Area:
    """A reservation of eight pages and eight pages for it, both as large as two granules."""

    driver: _core.Driver
    base: int
    pages: list[int]
    page: int  # bytes
    bytes: int

    def at(self, i: int) -> int:
        return self.base + i * self.page

    def map(self, first: int, pages: list[int]) -> None:
        """Maps with access."""
        self.driver.map(self.at(first), pages, self.page)
        self.driver.set_access(self.at(first), len(pages) * self.page)

    def unmap(self, first: int, n: int) -> None:
        self.driver.unmap(self.at(first), n * self.page)


class Memory(Protocol):
    """A driver's memory, as the test sees it after all work is done."""

    def read(self, address: int, nbytes: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def accessible(self, address: int) -> bool | None:
        """Whether a byte can be read; None where asking would kill the process."""


class HostMemory:
    """Memory of this process."""

    def __init__(self) -> None:
        self._pipe = os.pipe()

    def close(self) -> None:
        for fd in self._pipe:
            os.close(fd)

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def accessible(self, address: int) -> bool:
        # The kernel reads the byte for us and answers EFAULT where we would get a signal.
        try:
            os.write(self._pipe[1], (ctypes.c_char * 1).from_address(address))
        except OSError:
            return False
        os.read(self._pipe[0], 1)
        return True


class FakeMemory:
    """Memory of the fake's devices: ordinary memory, with an error where access would fault."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake

    def read(self, address: int, nbytes: int) -> bytes:
        return self._fake.read(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        self._fake.write(address, data)

    def accessible(self, address: int) -> bool:
        try:
            self._fake.read(address, 1)
        except RuntimeError:
            return False
        return True


class GpuMemory:
    """Memory of a GPU, by synchronous copies that use nothing of the driver under test."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(REAL_LIBCUDA)
        self._call("cuInit", 0)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)

    def close(self) -> None:
        self._call("cuDevicePrimaryCtxRelease_v2", 0)

    def read(self, address: int, nbytes: int) -> bytes:
        out = ctypes.create_string_buffer(nbytes)
        self._in_context("cuMemcpyDtoH_v2", out, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return out.raw

    def write(self, address: int, data: bytes) -> None:
        size = ctypes.c_size_t(len(data))
        self._in_context("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, size)

    def accessible(self, address: int) -> None:
        return None

    def _in_context(self, name: str, *arguments: object) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call("cuCtxSynchronize")
            self._call(name, *arguments)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        assert code == 0, f"{name} gave CUresult {code}"
