"""PyTorch's calls of the entry points, one by one; each is run in a process of its own.

``python -m tests.torch_bridge.entries NAME DRIVER`` runs one. They assert, and print nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading

import torch

from tests.drivers import fake_library_path
from tests.torch_bridge import Bridge
from tests.torch_bridge.world import MIB, block, error_of, main, world
from vattn import _core


def fraction(kind: str) -> None:
    """torch.cuda.set_per_process_memory_fraction, and its bad values."""
    with world(kind, budget_bytes=256 * MIB) as here:
        total = here.pool.driver.memory_info()[1]
        here.bridge.memory_fraction(32 * MIB / total)
        keep = block(16 * MIB)
        try:
            block(32 * MIB)
            raise AssertionError("this is beyond the fraction")
        except torch.OutOfMemoryError as error:
            assert "limit" in str(error), error
        here.bridge.memory_fraction(1.0)
        block(32 * MIB)
        del keep
        for bad in (-0.1, 1.5, float("nan"), 0.0):
            raised = error_of(lambda bad=bad: here.bridge.memory_fraction(bad))  # type: ignore[misc]
            assert (raised.kind, "fraction=" in str(raised)) == ("c10::Error", True), raised
        here.bridge.reset()
        assert here.pool.stats()["created_bytes"] == 0
        here.bridge.init(8)
        assert "CUDA_VISIBLE_DEVICES" in str(error_of(lambda: here.bridge.init(65)))


def record_stream(kind: str) -> None:
    """What another stream uses is not used again before that stream is done."""
    assert kind == "cuda_fake"
    with world(kind) as here:
        assert here.fake is not None
        main, side = (here.pool.driver.create_stream() for _ in range(2))
        here.bridge.use(main)
        tensor = block(8 * MIB)
        place = tensor.data_ptr()
        here.fake.hold(side)
        here.fake.launch(side, [(place, 8 * MIB)])
        here.bridge.record_stream(place, side)
        del tensor
        other = block(8 * MIB)
        assert other.data_ptr() != place, "used again though a kernel is still at it"
        here.fake.release(side)
        again = block(8 * MIB)
        assert again.data_ptr() == place
        # Memory that is not the allocator's is left alone, as with PyTorch's own.
        mine = ctypes.create_string_buffer(64)
        here.bridge.record_stream(ctypes.addressof(mine), side)
        base, size = here.bridge.base_alloc(again.data_ptr() + 4096)
        assert (base, size) == (place, 8 * MIB)
        assert error_of(lambda: here.bridge.base_alloc(ctypes.addressof(mine))).kind == "c10::Error"
        del other, again
        here.bridge.use(0)
        for stream in (main, side):
            here.pool.driver.synchronize(stream)
            here.pool.driver.destroy_stream(stream)


def graph_pool(kind: str) -> None:
    """Memory of a graph keeps its address and its pages until the pool is released."""
    with world(kind, budget_bytes=64 * MIB) as here:
        graph = (0, 7)
        capture = here.pool.driver.create_stream() if kind == "cuda_fake" else 99
        here.bridge.begin_pool(graph, [capture])
        here.bridge.use(capture)
        inside = torch.full((8 * MIB,), 3, dtype=torch.uint8)
        place = inside.data_ptr()
        here.bridge.use(0)
        outside = block(MIB)
        here.bridge.end_pool(graph)
        del inside
        # Free, but a replay may write there: nobody else gets it, however short memory is.
        held = []
        try:
            while True:
                held.append(block(2 * MIB))
        except torch.OutOfMemoryError:
            pass
        taken = [(t.data_ptr(), t.nbytes) for t in held]
        assert all(p + n <= place or p >= place + 8 * MIB for p, n in taken)
        assert ctypes.string_at(place, 4) == b"\x03" * 4, "its pages went elsewhere"
        assert len(held) == (64 - 8 - 2) // 2
        here.bridge.release_pool(graph)
        held += [block(2 * MIB) for _ in range(4)]
        assert error_of(lambda: here.bridge.end_pool(graph)).kind == "c10::Error"
        here.bridge.release_pool(graph)  # once too often: told, never thrown
        assert _core.torch_entry_errors()["failed"] == 1
        del outside


def threads(kind: str) -> None:
    """Two threads on streams of their own, through PyTorch, with tensors handed across."""
    with world(kind) as here:
        streams = [here.pool.driver.create_stream() for _ in range(2)]
        if kind != "cuda_fake":
            streams = [11, 12]
        wrong: list[BaseException] = []
        inbox: list[list[torch.Tensor]] = [[], []]

        def work(me: int) -> None:
            here.bridge.use(streams[me])
            try:
                for i in range(400):
                    x = torch.full((1000 + 37 * (i % 50),), me + 1.0)
                    y = (x * 2).reshape(-1, 1) + torch.zeros(1, 8)
                    assert float(y.min()) == float(y.max()) == 2.0 * (me + 1)
                    inbox[1 - me].append(y)  # freed by the other thread
                    if len(inbox[me]) > 5:
                        inbox[me].pop(0)
            except BaseException as error:
                wrong.append(error)

        both = [threading.Thread(target=work, args=(me,)) for me in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert wrong == []
        inbox.clear()
        gc.collect()
        here.check()


def bad_frees(kind: str) -> None:
    """Told once for each kind, counted, and without effect."""
    with world(kind) as here:
        other = _core.CachingAllocator(_core.PagePool(_core.host_driver(), budget_bytes=8 * MIB))
        _core.install_allocator(1, other)
        address = here.bridge.alloc(5 * MIB)
        small = here.bridge.alloc(100)
        for _ in range(3):
            here.bridge.free(0x1234500, 512)
            here.bridge.free(address, 4 * MIB)
            here.bridge.free(small, 101)
            here.bridge.free(address, 5 * MIB, device=1)
            here.bridge.free(address, 5 * MIB, device=2)
            here.bridge.free(address, 5 * MIB, device=-1)
        here.bridge.free(0, 0)
        errors = {"unknown": 3, "wrong_size": 6, "wrong_device": 9, "failed": 0}
        assert _core.torch_entry_errors() == errors
        assert here.live_bytes() == 5 * MIB + 512
        here.bridge.free(address, 5 * MIB)
        here.bridge.free(address, 5 * MIB)  # double
        here.bridge.free(small, 100)
        here.bridge.free(small, 100)
        assert _core.torch_entry_errors() == errors | {"unknown": 5}
        assert here.live_bytes() == 0
        assert here.bridge.alloc(0) == 0
        for device in (-1, 64, 9):
            assert error_of(lambda d=device: here.bridge.alloc(512, d)).kind == "c10::Error"  # type: ignore[misc]
        assert error_of(lambda: here.bridge.alloc(-5)).kind == "c10::OutOfMemoryError"


def fork(kind: str) -> None:
    """A child may drop its copies of tensors; using the allocator there is an error."""
    with world(kind) as here:
        tensor = torch.ones(MIB)
        here.bridge.remove()
        child = os.fork()
        if child == 0:
            here.bridge.free(tensor.data_ptr(), tensor.nbytes)
            error = error_of(lambda: here.bridge.alloc(512))
            fine = error.kind == "c10::Error" and "fork" in str(error)
            error = error_of(lambda: here.bridge.alloc(512, 3))
            fine = fine and error.kind == "c10::Error" and "fork" in str(error)
            fine = fine and not any(_core.torch_entry_errors().values())
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert float(tensor.sum()) == MIB


def fork_before(kind: str) -> None:
    """A parent that has only set options leaves the device to its children."""
    assert kind == "cuda_fake"
    bridge = Bridge()
    _core.configure_torch_allocator(
        enabled=True,
        budget_bytes=32 * MIB,
        libcuda=str(fake_library_path()),
        host_accessible=True,
    )
    child = os.fork()
    if child == 0:
        address = bridge.alloc(MIB)
        ctypes.memset(address, 1, MIB)
        made = _core.torch_allocator(0)
        fine = made is not None and made.pool.stats()["budget_bytes"] == 32 * MIB
        fine = fine and _core.torch_allocator_enabled()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _core.torch_allocator_devices() == []
    bridge.alloc(MIB)
    assert _core.torch_allocator_devices() == [0]


def driver_failure(kind: str) -> None:
    """A failing driver is an error of PyTorch's, and running out there is out of memory."""
    with world(kind) as here:
        assert here.fake is not None
        here.fake.fail("cuMemMap", nth=1, code=719)
        error = error_of(lambda: here.bridge.alloc(MIB))
        assert (error.kind, "cuMemMap" in str(error)) == ("c10::Error", True), error
        here.fake.clear_failures()
        here.bridge.free(here.bridge.alloc(MIB), MIB)
        here.fake.fail("cuMemCreate", nth=1, code=2, count=0)
        error = error_of(lambda: here.bridge.alloc(64 * MIB))
        assert error.kind == "c10::OutOfMemoryError", error
        here.fake.clear_failures()
        here.bridge.free(here.bridge.alloc(64 * MIB), 64 * MIB)


def at_exit(kind: str) -> None:
    """Tensors that are alive when the process ends; the caller sees that nothing is said."""
    stay = world(kind)
    here = stay.__enter__()
    sys.modules["kept"] = [torch.ones(MIB), torch.arange(10), here, stay]  # type: ignore[assignment]


if __name__ == "__main__":
    main(
        fraction,
        record_stream,
        graph_pool,
        threads,
        bad_frees,
        fork,
        fork_before,
        driver_failure,
        at_exit,
    )
