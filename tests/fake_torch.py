"""What a CUDA build of torch has for allocators in ``torch._C``, on the fake libcuda.

It keeps PyTorch's rules for swapping allocators, calls a pluggable allocator's functions by their
addresses, refuses for it what PyTorch refuses, and routes MemPools as PyTorch does (the first pool
that was begun and accepts a thread has it). Checked by hand against torch 2.11.0+cu130.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from tests.drivers import fake_library_path
from tests.fake_cuda.fake import FakeCuda

MIB = 1 << 20
_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_SETTERS = {
    "set_init_fn": ctypes.CFUNCTYPE(None, ctypes.c_int),
    "set_reset_fn": ctypes.CFUNCTYPE(None),
    "set_memory_fraction_fn": ctypes.CFUNCTYPE(None, ctypes.c_double, ctypes.c_int),
    "set_base_alloc_fn": ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    "set_record_stream_fn": ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p),
    "set_begin_allocate_to_pool": None,  # takes a C++ object
    "set_end_allocate_to_pool_fn": None,
    "set_release_pool": None,
}


class Pluggable:
    """``torch._C._CUDAPluggableAllocator``: functions by address."""

    def __init__(self, alloc: int, free: int) -> None:
        self.alloc, self.free = _ALLOC(alloc), _FREE(free)
        self.functions: dict[str, Any] = {}
        self.addresses: dict[str, int] = {}
        self.initialized = False
        self.sizes: dict[int, tuple[int, int]] = {}
        for name, signature in _SETTERS.items():
            setattr(self, name, self._setter(name, signature))

    def _setter(self, name: str, signature: Any) -> Callable[[int], None]:
        def set_function(address: int) -> None:
            assert isinstance(address, int)
            self.addresses[name] = address
            if signature is not None:
                self.functions[name] = signature(address)

        return set_function

    def raw_alloc(self, nbytes: int, device: int, stream: int) -> int:
        address = self.alloc(nbytes, device, stream) or 0
        self.sizes[address] = nbytes, device
        return address

    def raw_delete(self, address: int) -> None:
        nbytes, device = self.sizes.pop(address)
        self.free(address, nbytes, device, 0)


class MemPool:
    """``torch.cuda.MemPool``."""

    made = 0

    def __init__(self, allocator: Pluggable | None = None, **_: object) -> None:
        assert isinstance(allocator, Pluggable)
        assert isinstance(FAKE.current, Native), "PyTorch's own allocator has these"
        MemPool.made += 1
        self.allocator, self.id = allocator, (0, MemPool.made)
        FAKE.pools[self.id] = self


class Native:
    """PyTorch's own allocator."""

    initialized = False


class Cudart:
    """``torch.cuda.cudart()``: page-locked memory."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}  # bytes, by address
        self.times = 0
        self.limit = 1 << 62

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags in (0, 1)
        if nbytes > self.limit:
            return 2
        if address in self.locked:
            return 712
        self.locked[address] = nbytes
        self.times += 1
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.locked.pop(address, None) is not None else 713


class FakeTorch:
    """What the allocator part of torch knows."""

    def __init__(self) -> None:
        self.native = Native()
        self.current: Any = self.native
        self.backend = "native"
        self.pointer = ctypes.c_void_p(id(self.native))  # the C++ variable
        self.objects: dict[int, Any] = {id(self.native): self.native}
        self.pools: dict[tuple[int, int], MemPool] = {}
        self.recording: list[tuple[tuple[int, int], int, int]] = []  # pool, device, thread
        self.cuda: FakeCuda | None = None
        self.cudart = Cudart()

    def sync(self) -> None:
        """PyTorch reads its variable each time."""
        self.current = self.objects[self.pointer.value or 0]

    def start(self) -> None:
        """``torch.cuda.init()``."""
        if torch.cuda._initialized:
            return
        self.sync()
        self.current.initialized = True
        if isinstance(self.current, Pluggable):
            self.current.functions["set_init_fn"](torch.cuda.device_count())
        torch.cuda._initialized = True

    def change(self, allocator: Pluggable) -> None:
        self.sync()
        if self.current.initialized:
            raise RuntimeError("Can't swap an already initialized allocator")
        self.objects[id(allocator)] = allocator
        self.pointer.value = id(allocator)

    def alloc(self, nbytes: int, stream: int) -> int:
        self.start()
        self.sync()
        if isinstance(self.current, Pluggable):
            return self.current.raw_alloc(nbytes, torch.cuda.current_device(), stream)
        me = threading.get_ident()
        for pool, device, thread in self.recording:
            if thread == me and device == torch.cuda.current_device():
                segment = -(-nbytes // (2 * MIB)) * 2 * MIB
                return self.pools[pool].allocator.raw_alloc(segment, device, stream)
        raise AssertionError("PyTorch's own memory is not part of this fake")

    def delete(self, address: int) -> None:
        for owner in (self.current, *(pool.allocator for pool in self.pools.values())):
            if isinstance(owner, Pluggable) and address in owner.sizes:
                owner.raw_delete(address)
                return
        raise AssertionError("not allocated")

    def begin(self, device: int, pool: tuple[int, int]) -> None:
        if any(each[0] == pool for each in self.recording):
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.append((pool, device, threading.get_ident()))

    def end(self, device: int, pool: tuple[int, int]) -> None:
        before = len(self.recording)
        self.recording = [r for r in self.recording if r[:2] != (pool, device)]
        if len(self.recording) != before - 1:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def only_native(self, name: str, answer: Any) -> Callable[..., Any]:
        def call(*_: object) -> Any:
            self.sync()
            if isinstance(self.current, Pluggable):
                raise RuntimeError(f"CUDAPluggableAllocator does not yet support {name}.")
            return answer

        return call

    def hook(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.sync()
            if isinstance(self.current, Pluggable):
                return self.current.functions[name](*arguments)
            return None

        return call


FAKE = FakeTorch()
NATIVE_STATS = {"allocated_bytes": {"all": {"current": -1, "peak": -1}}}


def install(devices: int = 1) -> FakeTorch:
    """Gives this process's torch the CUDA half of an allocator."""
    os.environ["VATTN_LIBCUDA"] = str(fake_library_path())
    FAKE.cuda = FakeCuda(fake_library_path())
    FAKE.cuda.configure(device_bytes=256 * MIB, devices=devices)
    c: Any = torch._C
    c._cuda_customAllocator = Pluggable
    c._cuda_changeCurrentAllocator = FAKE.change
    c._cuda_memoryStats = FAKE.only_native("getDeviceStats", NATIVE_STATS)
    c._cuda_resetPeakMemoryStats = FAKE.only_native("resetPeakStats", None)
    c._cuda_resetAccumulatedMemoryStats = FAKE.only_native("resetAccumulatedStats", None)
    c._cuda_memorySnapshot = FAKE.only_native("snapshot", {"segments": []})
    c._cuda_getMemoryFraction = FAKE.only_native("getMemoryFraction", 1.0)
    c._cuda_getCheckpointState = FAKE.only_native("getCheckpointState", None)
    c._cuda_checkPoolLiveAllocations = FAKE.only_native("checkPoolLiveAllocations", None)
    c._cuda_setCheckpointPoolState = FAKE.only_native("setCheckpointPoolState", None)
    c._cuda_emptyCache = FAKE.hook("set_reset_fn")
    c._cuda_setMemoryFraction = FAKE.hook("set_memory_fraction_fn")
    c._cuda_cudaCachingAllocator_raw_alloc = FAKE.alloc
    c._cuda_cudaCachingAllocator_raw_delete = FAKE.delete
    memory: Any = torch.cuda.memory
    memory._cuda_beginAllocateCurrentThreadToPool = FAKE.begin
    memory._cuda_endAllocateToPool = FAKE.end
    memory._cuda_releasePool = lambda *_: None
    cuda: Any = torch.cuda
    memory.MemPool = cuda.MemPool = MemPool
    cuda.init = cuda._lazy_init = memory._lazy_init = FAKE.start
    cuda.is_available = lambda: True
    cuda.device_count = lambda: devices
    cuda.current_device = _current_device
    cuda.device = _DeviceContext
    version: Any = torch.version
    version.cuda = "13.0"
    cuda.cudart = lambda: FAKE.cudart
    cuda.is_current_stream_capturing = lambda: False
    c._cuda_getAllocatorBackend = lambda: FAKE.backend
    from vattn.allocator import torch_hooks

    torch_hooks._current_pointer = lambda: FAKE.pointer
    return FAKE


_device = threading.local()


def _current_device() -> int:
    FAKE.start()
    return getattr(_device, "index", 0)


class _DeviceContext:
    """``torch.cuda.device``."""

    def __init__(self, device: Any) -> None:
        self.index = device if isinstance(device, int) else torch.device(device).index

    def __enter__(self) -> None:
        self.before = getattr(_device, "index", 0)
        _device.index = self.index

    def __exit__(self, *_: object) -> None:
        _device.index = self.before
