"""The system calls beneath the host driver, made bare through ctypes, to compare it with.

Same kind of memfd, same flags; none of the driver's checks, bookkeeping or ``madvise``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    use_errno=True,
)
_MMAP = _PROTOTYPE(("mmap", _LIBC))
# Takes the same arguments from Python and ignores them: what a call through ctypes costs.
_NOTHING = _PROTOTYPE(("getpagesize", _LIBC))

MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
_FAILED = ctypes.c_void_p(-1).value
SYSTEM_PAGE = 4096


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int, at: int) -> int:
    result = _MMAP(address, size, protection, flags, fd, at)
    if result == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"mmap of {size} bytes: {os.strerror(error)}")
    return int(result)


class Bare:
    """A reserved range and a memfd of ``pages`` pages that exist (or, sparse, do not yet)."""

    def __init__(self, pages: int, page_bytes: int, *, sparse: bool = False) -> None:
        self.page_bytes = page_bytes
        self.bytes = pages * page_bytes
        self.fd = os.memfd_create("vattn-bench")
        os.ftruncate(self.fd, self.bytes)
        if not sparse:
            os.posix_fallocate(self.fd, 0, self.bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.base = _mmap(None, self.bytes, mmap.PROT_READ, flags, -1, 0)

    def close(self) -> None:
        _LIBC.munmap(self.base, self.bytes)
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, pages: Sequence[int], *, populate: bool = True) -> None:
        """Maps pages of the memfd side by side; neighbours in it with one call."""
        flags = mmap.MAP_SHARED | MAP_FIXED | (MAP_POPULATE if populate else 0)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        size = self.page_bytes
        i = 0
        while i < len(pages):
            n = 1
            while i + n < len(pages) and pages[i + n] == pages[i] + n:
                n += 1
            _mmap(self.base + i * size, n * size, protection, flags, self.fd, pages[i] * size)
            i += n

    def calls_of_map(self, pages: Sequence[int]) -> list[tuple[int, int, int]]:
        """Address, size and offset of each call that :meth:`map` makes."""
        starts = [i for i, page in enumerate(pages) if i == 0 or page != pages[i - 1] + 1]
        ends = [*starts[1:], len(pages)]
        size = self.page_bytes
        return [
            (self.base + a * size, (b - a) * size, pages[a] * size)
            for a, b in zip(starts, ends, strict=True)
        ]

    def unmap(self, pages: int) -> None:
        """Back to reserved, as the driver does it."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        _mmap(self.base, pages * self.page_bytes, mmap.PROT_READ, flags, -1, 0)

    def touch(self, pages: int) -> None:
        """Writes one byte of every system page."""
        self.bytes_view(pages)[::SYSTEM_PAGE] = 1

    def bytes_view(self, pages: int) -> npt.NDArray[np.uint8]:
        buffer = (ctypes.c_ubyte * (pages * self.page_bytes)).from_address(self.base)
        return np.frombuffer(memoryview(buffer), dtype=np.uint8)

    def punch(self) -> None:
        """Takes all memory from the memfd."""
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, self.bytes)

    def renew(self) -> None:
        """New pages, never mapped, whose first touch is paid: zeros are written to the memfd."""
        self.punch()
        zeros = bytes(min(self.bytes, 1 << 20))
        for at in range(0, self.bytes, len(zeros)):
            os.pwrite(self.fd, zeros[: self.bytes - at], at)


def timed_map_calls(fd: int, calls: Sequence[tuple[int, int, int]]) -> float:
    """Seconds of the bare calls alone, without the cost of ctypes and the loop."""
    flags = mmap.MAP_SHARED | MAP_FIXED | MAP_POPULATE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    start = time.perf_counter()
    for address, size, offset in calls:
        _MMAP(address, size, protection, flags, fd, offset)
    middle = time.perf_counter()
    for address, size, offset in calls:
        _NOTHING(address, size, protection, flags, fd, offset)
    return max(2 * middle - start - time.perf_counter(), 1e-9)
