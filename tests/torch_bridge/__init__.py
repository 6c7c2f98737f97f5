"""Real PyTorch programs on vattn's entry points: CPU tensors whose memory comes from them.

``bridge.cpp`` is compiled against the headers of the installed torch, once for each version of
either, and loaded with ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from vattn import _core

SOURCE = Path(__file__).with_name("bridge.cpp")
BUILDS = Path(__file__).resolve().parents[2] / "build/torch_bridge"
_ROOM = 8192  # for a message
_ENTRIES = (
    "alloc",
    "free",
    "record_stream",
    "begin_allocate_to_pool",
    "end_allocate_to_pool",
    "release_pool",
    "memory_fraction",
    "base_alloc",
    "reset",
    "init",
)


class TorchError(Exception):
    """An entry point threw; `kind` is the type that C++ code of PyTorch caught."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def compiled() -> Path:
    """The bridge's library for this torch."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = BUILDS / f"bridge-{key}.so"
    if not library.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which(os.environ.get("CXX", "g++")) or "g++"
        home = Path(torch.__file__).parent
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=default"]
        command += ["-isystem", str(home / "include"), "-o", str(partial), str(SOURCE)]
        command += [f"-L{home / 'lib'}", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
        subprocess.run(command, check=True)
        partial.rename(library)  # whole or not at all, whoever else builds it
    return library


class Bridge:
    """The allocator of CPU tensors, while installed; one for each process."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(compiled()))
        self._lib.bridge_live.restype = ctypes.c_uint64
        points = _core.torch_entry_points()
        self._lib.bridge_entries(*(ctypes.c_uint64(points[name]) for name in _ENTRIES))

    def install(self) -> None:
        self._lib.bridge_install()

    def remove(self) -> None:
        self._lib.bridge_remove()

    def use(self, stream: int, device: int = 0) -> None:
        """Device and stream of this thread's requests from now on."""
        self._lib.bridge_use(ctypes.c_int(device), ctypes.c_uint64(stream))

    def live(self) -> int:
        """Tensors' memory that is not freed."""
        return int(self._lib.bridge_live())

    def record_stream(self, address: int, stream: int) -> None:
        self._call("record_stream", ctypes.c_uint64(address), ctypes.c_uint64(stream))

    def begin_pool(self, pool: tuple[int, int], streams: Sequence[int], device: int = 0) -> None:
        mine = (ctypes.c_uint64 * len(streams))(*streams)
        self._call("begin_pool", device, *_id(pool), mine, ctypes.c_size_t(len(streams)))

    def end_pool(self, pool: tuple[int, int], device: int = 0) -> None:
        self._call("end_pool", device, *_id(pool))

    def release_pool(self, pool: tuple[int, int], device: int = 0) -> None:
        self._call("release_pool", device, *_id(pool))

    def memory_fraction(self, fraction: float, device: int = 0) -> None:
        self._call("memory_fraction", ctypes.c_double(fraction), device)

    def base_alloc(self, address: int) -> tuple[int, int]:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("base_alloc", ctypes.c_uint64(address), ctypes.byref(base), ctypes.byref(size))
        return base.value, size.value

    def alloc(self, nbytes: int, device: int = 0) -> int:
        address = ctypes.c_uint64()
        self._call("alloc", ctypes.c_size_t(nbytes), device, ctypes.byref(address))
        return address.value

    def free(self, address: int, nbytes: int, device: int = 0, stream: int = 0) -> None:
        """As a tensor's end does; never throws."""
        function = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        )(_core.torch_entry_points()["free"])
        function(address, nbytes, device, stream)

    def reset(self) -> None:
        self._call("reset")

    def init(self, devices: int) -> None:
        self._call("init", devices)

    def _call(self, name: str, *arguments: object) -> None:
        message = ctypes.create_string_buffer(_ROOM)
        function = getattr(self._lib, f"bridge_{name}")
        outcome = function(*arguments, message, ctypes.c_size_t(_ROOM))
        if outcome:
            kind = ("", "c10::OutOfMemoryError", "c10::Error", "std::exception")[outcome]
            raise TorchError(kind, message.value.decode())


def _id(pool: tuple[int, int]) -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
    return ctypes.c_uint64(pool[0]), ctypes.c_uint64(pool[1])
