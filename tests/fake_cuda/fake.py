"""Typed wrapper of the fake libcuda's control API (`control.h` documents each function)."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NEVER = 2**64 - 1

INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
DEINITIALIZED = 4
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
ILLEGAL_STATE = 401
NOT_READY = 600
ILLEGAL_ADDRESS = 700
LAUNCH_TIMEOUT = 702
CONTEXT_IS_DESTROYED = 709
LAUNCH_FAILED = 719
NOT_SUPPORTED = 801
STREAM_CAPTURE_UNSUPPORTED = 900

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ.get("VATTN_FAKE_CUDA", ROOT / "build/fake_cuda/libfake_cuda.so"))
BUILD_COMMAND = "make fake"


class StreamMode(IntEnum):
    """When the work of a stream is done."""

    IMMEDIATE = 0
    HELD = 1
    LAZY = 2


class Stats(ctypes.Structure):
    """`struct fake_stats`: what exists and what was done, in the order of control.h."""

    bytes_live: int
    bytes_peak: int
    bytes_created: int
    handles_live: int
    handles_peak: int
    mappings_live: int
    mappings_peak: int
    reservations_live: int
    reserved_bytes: int
    host_allocs_live: int
    streams_live: int
    events_live: int
    contexts_retained: int
    work_pending: int
    launches: int
    copies: int
    copied_bytes: int
    memsets: int
    memset_bytes: int
    access_regrants: int
    failures_injected: int
    violations: int
    physical_bytes: int


# The annotations are the field list: all are uint64_t.
Stats._fields_ = [(name, c_uint64) for name in Stats.__annotations__]

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "fake_reset": (c_size_t, [c_char_p, c_size_t]),
    "fake_config_defaults": (c_int, []),
    "fake_config_device_bytes": (c_int, [c_size_t]),
    "fake_config_granularity": (c_int, [c_size_t]),
    "fake_config_devices": (c_int, [c_int]),
    "fake_config_poison": (c_int, [c_int]),
    "fake_config_elide": (c_int, [c_int]),
    "fake_config_watchdog_ms": (c_int, [c_uint]),
    "fake_config_oom_at": (c_int, [c_size_t]),
    "fake_config_stream_mode": (c_int, [c_int]),
    "fake_fail": (c_int, [c_char_p, c_uint64, c_int, c_int]),
    "fake_clear_failures": (None, []),
    "fake_sticky": (None, [c_int]),
    "fake_latency": (c_int, [c_char_p, c_uint64]),
    "fake_stream_mode": (c_int, [c_void_p, c_int]),
    "fake_stream_step": (c_int, [c_void_p, c_int]),
    "fake_stream_pending": (c_int, [c_void_p]),
    "fake_streams": (c_size_t, [POINTER(c_void_p), c_size_t]),
    "fake_stream_capture": (c_int, [c_void_p, c_int]),
    "fake_launch": (c_int, [c_void_p, POINTER(c_uint64), POINTER(c_size_t), c_int, c_char_p]),
    "fake_read": (c_int, [c_uint64, c_void_p, c_size_t]),
    "fake_write": (c_int, [c_uint64, c_char_p, c_size_t]),
    "fake_violations": (c_size_t, [c_char_p, c_size_t]),
    "fake_clear_violations": (None, []),
    "fake_check_leaks": (c_size_t, [c_char_p, c_size_t]),
    "fake_calls": (c_int64, [c_char_p]),
    "fake_call_names": (c_size_t, [c_char_p, c_size_t]),
    "fake_reset_calls": (None, []),
    "fake_get_stats": (None, [POINTER(Stats)]),
}


class FakeCudaError(RuntimeError):
    """A control call that the fake refused; `code` is the CUresult."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what}: CUresult {code}")
        self.code = code


class FakeCuda:
    """Controls the fake that the code under test loads from the same file.

    One process has one fake: two objects for one path control the same devices. `lib` is the
    ctypes library, for tests that call driver functions themselves.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        resolved = Path(path).resolve()
        if not resolved.exists():
            raise FileNotFoundError(f"{resolved} is not built; run `{BUILD_COMMAND}`")
        self.path = resolved
        self.lib = ctypes.CDLL(str(resolved))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype = result
            function.argtypes = arguments

    # Life cycle and settings.

    def reset(self, *, keep_settings: bool = False) -> list[str]:
        """Like a new process; settings go back to their defaults. Returns what had leaked."""
        leaked = self._lines("fake_check_leaks")
        self.lib.fake_reset(None, 0)
        if not keep_settings:
            self._check("fake_config_defaults")
        return leaked

    def configure(
        self,
        *,
        device_bytes: int | None = None,
        granularity: int | None = None,
        devices: int | None = None,
        poison: bool | None = None,
        elide: bool | None = None,
        watchdog_ms: int | None = None,
        oom_at: int | None = None,
        stream_mode: StreamMode | None = None,
    ) -> None:
        """Changes the settings that are given; FakeCudaError if one is bad or cannot change now."""
        settings = {
            "device_bytes": device_bytes,
            "granularity": granularity,
            "devices": devices,
            "poison": poison,
            "elide": elide,
            "watchdog_ms": watchdog_ms,
            "oom_at": oom_at,
            "stream_mode": stream_mode,
        }
        for name, value in settings.items():
            if value is not None:
                self._check(f"fake_config_{name}", int(value))

    # Injection.

    def fail(self, name: str, nth: int = 1, code: int = LAUNCH_FAILED, count: int = 1) -> None:
        """The nth call of `name` ("*": any) from now, and count - 1 more, return `code`.

        A count of 0 fails all from the nth on; -1 makes the nth failure stick to every call.
        """
        self._check("fake_fail", name.encode(), nth, code, count)

    def clear_failures(self) -> None:
        self.lib.fake_clear_failures()

    def sticky(self, code: int) -> None:
        """Every call returns `code` from now on; 0 ends it."""
        self.lib.fake_sticky(code)

    def latency(self, name: str, nanoseconds: int) -> None:
        """Each call of `name` ("*": all) takes this much longer."""
        self._check("fake_latency", name.encode(), nanoseconds)

    # Streams and kernels. A stream is an integer handle; 0 is the default stream.

    def stream_mode(self, stream: int, mode: StreamMode) -> None:
        self._check("fake_stream_mode", stream, int(mode))

    def hold(self, stream: int) -> None:
        """Work given to `stream` stays queued until step or release."""
        self.stream_mode(stream, StreamMode.HELD)

    def release(self, stream: int) -> None:
        """Runs what is queued and ends the hold."""
        self.stream_mode(stream, StreamMode.IMMEDIATE)

    @contextmanager
    def held(self, stream: int) -> Iterator[None]:
        """Holds `stream` for a with block and releases it afterwards."""
        self.hold(stream)
        try:
            yield
        finally:
            self.release(stream)

    def step(self, stream: int, count: int = 1) -> int:
        """Runs up to `count` queued pieces of work; returns how many ran."""
        return self._count("fake_stream_step", stream, count)

    def pending(self, stream: int) -> int:
        """Queued pieces of work."""
        return self._count("fake_stream_pending", stream)

    def streams(self) -> list[int]:
        """Created streams that are alive, oldest first: finds those that the driver made."""
        room = (c_void_p * int(self.lib.fake_streams(None, 0)))()
        count = min(int(self.lib.fake_streams(room, len(room))), len(room))
        return [int(handle or 0) for handle in room[:count]]

    def capture(self, stream: int, on: bool = True) -> None:
        """Pretends that `stream` is being captured into a graph."""
        self._check("fake_stream_capture", stream, int(on))

    def launch(self, stream: int, ranges: Sequence[tuple[int, int]], name: str = "kernel") -> None:
        """A kernel on `stream` that may touch `ranges`, each (address, bytes)."""
        starts = (c_uint64 * len(ranges))(*(start for start, _ in ranges))
        sizes = (c_size_t * len(ranges))(*(size for _, size in ranges))
        self._check("fake_launch", stream, starts, sizes, len(ranges), name.encode())

    # Bytes.

    def read(self, address: int, nbytes: int) -> bytes:
        """Device memory; FakeCudaError ILLEGAL_ADDRESS where a plain access would fault."""
        out = ctypes.create_string_buffer(nbytes)
        self._check("fake_read", address, out, nbytes)
        return out.raw

    def write(self, address: int, data: bytes) -> None:
        self._check("fake_write", address, data, len(data))

    # Results.

    def violations(self) -> list[str]:
        """Broken rules of the project since the last reset or clear."""
        return self._lines("fake_violations")

    def clear_violations(self) -> None:
        self.lib.fake_clear_violations()

    def leaks(self) -> list[str]:
        """One line for each thing that exists now."""
        return self._lines("fake_check_leaks")

    @overload
    def calls(self) -> dict[str, int]: ...
    @overload
    def calls(self, name: str) -> int: ...
    def calls(self, name: str | None = None) -> int | dict[str, int]:
        """Calls since the last reset: of one driver function, or of each that was called."""
        if name is None:
            counts = {each: self.calls(each) for each in self._lines("fake_call_names")}
            return {each: count for each, count in counts.items() if count}
        count = int(self.lib.fake_calls(name.encode()))
        if count < 0:
            raise ValueError(f"the fake has no function {name!r}")
        return count

    def total_calls(self) -> int:
        return int(self.lib.fake_calls(None))

    def reset_calls(self) -> None:
        self.lib.fake_reset_calls()

    def stats(self) -> Stats:
        stats = Stats()
        self.lib.fake_get_stats(byref(stats))
        return stats

    def _check(self, function: str, *arguments: object) -> None:
        code = int(getattr(self.lib, function)(*arguments))
        if code != 0:
            raise FakeCudaError(f"{function}{arguments}", code)

    def _count(self, function: str, *arguments: object) -> int:
        count = int(getattr(self.lib, function)(*arguments))
        if count < 0:
            raise FakeCudaError(f"{function}{arguments}", INVALID_HANDLE)
        return count

    def _lines(self, function: str) -> list[str]:
        read = getattr(self.lib, function)
        size = int(read(None, 0)) + 1
        while True:  # another thread may add lines between the two calls
            buffer = ctypes.create_string_buffer(size)
            length = int(read(buffer, size))
            if length < size:
                return buffer.value.decode().splitlines()
            size = length + 1
