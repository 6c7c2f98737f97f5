"""Pools, pausing and what comes first, on a torch with CUDA; a process for each, as door_cases."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.door_cases import give, of_device, take
from tests.fake_torch import FAKE, MIB, NATIVE_STATS, MemPool, install
from vattn import _core, allocator


def in_thread(work: Callable[[], object]) -> object:
    """What it returns or raises in another thread."""
    out: list[object] = []

    def body() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return out[0]


def enter(tag: str) -> None:
    with allocator.pool(tag):
        pass


def a_paused_tag_has_no_pool() -> None:
    install()
    with allocator.pool("w"):
        a = take(3 * MIB)
    allocator.pause("w")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"tag='w' is paused on cuda:0.*resume\('w'\)"):
            enter("w")
    assert isinstance(in_thread(lambda: enter("w")), RuntimeError)
    assert FAKE.recording == []
    enter("other")
    allocator.resume("w")
    enter("w")
    give(a)


def a_paused_tag_has_no_pool_under_enable() -> None:
    install(devices=2)
    allocator.enable(budget_bytes=64 * MIB)
    with allocator.pool("w"):
        a = take(3 * MIB)
        b = take(MIB, device=1)
    allocator.pause("w", device=0)
    with pytest.raises(RuntimeError, match="tag='w' is paused on cuda:0"):
        enter("w")
    assert _core.current_tag() == 0
    with torch.cuda.device(1):
        enter("w")
    allocator.resume("w")
    enter("w")
    give(a)
    give(b)


def an_open_pool_is_not_paused() -> None:
    install()
    with allocator.pool("w"):
        a = take(3 * MIB)
        with pytest.raises(RuntimeError, match="open on cuda:0"):
            allocator.pause("w")
        with allocator.pool("x"):  # that of "w" is opened again after this one
            assert isinstance(in_thread(lambda: allocator.pause("w")), RuntimeError)
    assert not allocator.is_paused("w")
    allocator.pause("w")
    allocator.resume("w")
    give(a)


def pause_and_resume_wait_for_each_other() -> None:
    """A pause in the middle of another thread's resume: its backup is not the one dropped."""
    from vattn.allocator import pausing

    install()
    allocator.enable(budget_bytes=64 * MIB)
    with allocator.pool("w"):
        a = take(4 * MIB)
    allocator.pause("w")
    started, paused = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def second() -> None:
        started.set()
        allocator.pause("w")
        paused.set()

    class Slow(dict[Any, Any]):
        def pop(self, *key: Any) -> Any:
            if not threads:
                threads.append(threading.Thread(target=second))
                threads[0].start()
                started.wait()
                # Only a pause that does not wait gets through within this time.
                paused.wait(0.2)
            return super().pop(*key)

    pausing._backups = Slow(pausing._backups)
    allocator.resume("w")
    threads[0].join()
    assert allocator.is_paused("w")
    assert list(pausing._backups) == [("w", 0)]
    assert list(FAKE.cudart.locked) == [pausing._backups["w", 0].address]
    allocator.resume("w")
    assert FAKE.cudart.locked == {}
    give(a)


class Broken:
    """An allocator one of whose methods fails, before or after its work."""

    def __init__(self, inner: Any, name: str, error: BaseException, after: bool = False) -> None:
        self._inner, self._name, self._error, self._after = inner, name, error, after

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._inner, name)

        def fail(*arguments: Any, **named: Any) -> None:
            if self._after:
                getattr(self._inner, name)(*arguments, **named)
            raise self._error

        return fail


def a_failed_pause_is_undone() -> None:
    from vattn.allocator import pausing

    install(devices=2)
    allocator.enable(budget_bytes=64 * MIB)
    with allocator.pool("w"):
        a, b = take(4 * MIB), take(4 * MIB, device=1)
    # Interrupted as soon as it was done: the buffer has the only copy.
    real = [of_device(0), of_device(1)]
    seen: list[tuple[int, Any]] = [(0, real[0])]
    module: Any = pausing
    module.allocators_of = lambda device: seen
    seen.append((1, Broken(real[1], "pause", KeyboardInterrupt(), after=True)))
    with pytest.raises(KeyboardInterrupt):
        allocator.pause("w")
    assert not any(each.is_paused(_core.tag_id("w")) for each in real)
    assert FAKE.cudart.locked == {}
    assert pausing._backups == {}
    # One cannot be resumed: the others are, and the first error stays.
    seen[:] = [
        (0, Broken(real[0], "resume", MemoryError("no pages"))),
        (1, Broken(real[1], "pause", OSError("first"))),
    ]
    with pytest.raises(OSError, match="first") as caught:
        allocator.pause("w")
    assert caught.value.__notes__ == ["tag='w' stays paused on cuda:0: no pages"]
    assert list(pausing._backups) == [("w", 0)]
    real[0].resume(_core.tag_id("w"))
    give(a)
    give(b)


def backups_and_the_default_device() -> None:
    install()
    allocator.enable(budget_bytes=64 * MIB)
    with allocator.pool("w"):
        a = take(5 * MIB)
    for name in ("meta", "cuda"):
        with torch.device(name):
            allocator.pause("w", pinned=True)
            assert list(FAKE.cudart.locked.values()) == [5 * MIB]
            assert 0 not in FAKE.cudart.locked
            allocator.resume("w")
    FAKE.cudart.limit = MIB
    with pytest.raises(MemoryError, match=r"page-lock.*give pinned=False"):
        allocator.pause("w", pinned=True)
    assert not allocator.is_paused("w")
    allocator.pause("w")  # in pageable memory, as nothing was asked for
    assert allocator.is_paused("w")
    allocator.resume("w")
    give(a)


def nothing_to_pause() -> None:
    install()
    allocator.enable()
    enter("w")
    with pytest.raises(RuntimeError, match="tag='w' has no memory"):
        allocator.pause("w")
    assert not allocator.is_paused("w")


def graphs_are_captured_outside() -> None:
    install()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    cuda: Any = torch.cuda
    cuda.is_current_stream_capturing = lambda: True
    with pytest.raises(RuntimeError, match="being captured"):
        enter("w")
    cuda.is_current_stream_capturing = lambda: False
    enter("w")


def settings_that_pools_cannot_have() -> None:
    install()
    for name, value, message in (
        ("PYTORCH_ALLOC_CONF", "a:1,expandable_segments:True", "expandable segments"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: true", "PYTORCH_CUDA_ALLOC_CONF="),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "unset it"),
    ):
        os.environ[name] = value
        with pytest.raises(RuntimeError, match=message):
            enter("w")
        del os.environ[name]
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False,max_split_size_mb:64"
    enter("w")
    c: Any = torch._C
    c._accelerator_getAllocatorSettings = lambda: "expandable_segments:True"
    with pytest.raises(RuntimeError, match="settings=expandable_segments:True"):
        enter("w")
    c._accelerator_getAllocatorSettings = lambda: ""
    FAKE.backend = "cudaMallocAsync"
    with pytest.raises(RuntimeError, match=r"'cudaMallocAsync'.*'native'"):
        enter("w")


def trim_has_what_pools_cached() -> None:
    install()
    with allocator.pool("w"):
        give(take(3 * MIB))
    made = MemPool.made
    enter("w")
    assert MemPool.made == made
    with allocator.pool("x"):
        allocator.trim()
        enter("x")
    assert MemPool.made == made + 1
    enter("w")  # that one was closed
    assert MemPool.made == made + 2


def budgets_of_the_environment() -> None:
    install()
    os.environ["VATTN_BUDGET"] = "32MiB"
    registered: list[Any] = []
    at_exit: Any = atexit
    at_exit.register = registered.append
    assert allocator.page_pool("cuda:0").stats().budget_bytes == 32 * MIB
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert len(registered) == 1
    registered[0]()
    with pytest.raises(RuntimeError, match=r"call vattn.allocator.enable.. before them"):
        allocator.enable()


def budgets_start_no_cuda() -> None:
    install()
    allocator.set_budget("w", "4MiB")
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="memory of vattn is in use already"):
        allocator.enable()
    for bad, message in ((1024, "None for no bound"), (0, "None for no bound"), (10**30, "2..63")):
        with pytest.raises(ValueError, match=message):
            allocator.set_budget("w", bad)
    with pytest.raises(ValueError, match=r"keep_bytes.*too large"):
        allocator.trim(2**63)
    wrong: list[Any] = [True, -1, "gpu", "cpu", torch.device("cpu")]
    for device in wrong:
        for call in (allocator.pause, allocator.resume, allocator.is_paused):
            with pytest.raises(ValueError, match="not a CUDA device"):
                call("w", device=device)
        with pytest.raises(ValueError, match="not a CUDA device"):
            allocator.trim(device=device)
        with pytest.raises(ValueError, match="not a CUDA device"):
            allocator.page_pool(device)


def a_failed_enable_leaves_nothing() -> None:
    from vattn.allocator import torch_hooks

    install()
    cuda: Any = torch.cuda
    with pytest.raises(ValueError, match="too large"):
        allocator.enable(budget_bytes=10**30)
    before, cuda.memory.use_mem_pool = cuda.memory.use_mem_pool, None
    del cuda.memory.use_mem_pool
    with pytest.raises(RuntimeError, match=r"no torch\.cuda\.memory\.use_mem_pool"):
        allocator.enable()
    cuda.memory.use_mem_pool = before

    def fail() -> Any:
        raise AttributeError("no such thing")

    patch, torch_hooks.patch_torch = torch_hooks.patch_torch, fail
    with pytest.raises(AttributeError):
        allocator.enable()
    torch_hooks.patch_torch = patch
    change, cuda.memory.change_current_allocator = cuda.memory.change_current_allocator, fail
    with pytest.raises(TypeError):
        allocator.enable()
    cuda.memory.change_current_allocator = change
    FAKE.sync()
    assert FAKE.current is FAKE.native
    assert not allocator.is_enabled()
    assert torch._C._cuda_memoryStats(0) == NATIVE_STATS
    with pytest.raises(RuntimeError, match="not enabled"):
        allocator.disable()
    allocator.enable()
    assert torch.cuda.memory_allocated() == 0


CASES = (
    a_paused_tag_has_no_pool,
    a_paused_tag_has_no_pool_under_enable,
    an_open_pool_is_not_paused,
    pause_and_resume_wait_for_each_other,
    a_failed_pause_is_undone,
    backups_and_the_default_device,
    nothing_to_pause,
    graphs_are_captured_outside,
    settings_that_pools_cannot_have,
    trim_has_what_pools_cached,
    budgets_of_the_environment,
    budgets_start_no_cuda,
    a_failed_enable_leaves_nothing,
)
