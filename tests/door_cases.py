"""The Python doors on a torch with CUDA (fake_torch.py); each case runs in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fake_torch import FAKE, MIB, NATIVE_STATS, MemPool, Pluggable, install
from vattn import _core, allocator


def take(nbytes: int, device: int = 0) -> int:
    """Memory as PyTorch takes it for a tensor."""
    with torch.cuda.device(device):
        return int(torch.cuda.caching_allocator_alloc(nbytes, device, 0))


def give(address: int) -> None:
    torch.cuda.caching_allocator_delete(address)  # type: ignore[no-untyped-call]


def of_device(device: int = 0) -> _core.CachingAllocator:
    found = _core.torch_allocator(device)
    assert found is not None
    return found


def enable_wires_every_hook() -> None:
    install(devices=2)
    assert not allocator.is_enabled()
    allocator.enable(budget_bytes="64MiB", page_bytes=2 * MIB)
    assert allocator.is_enabled()
    FAKE.sync()
    plugged = FAKE.current
    points = _core.torch_entry_points()
    assert plugged.addresses == {
        "set_init_fn": points["init"],
        "set_reset_fn": points["reset"],
        "set_memory_fraction_fn": points["memory_fraction"],
        "set_base_alloc_fn": points["base_alloc"],
        "set_record_stream_fn": points["record_stream"],
        "set_begin_allocate_to_pool": points["begin_allocate_to_pool"],
        "set_end_allocate_to_pool_fn": points["end_allocate_to_pool"],
        "set_release_pool": points["release_pool"],
    }
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert _core.torch_allocator_devices() == []
    first, second = take(5 * MIB), take(3 * MIB, device=1)
    assert _core.torch_allocator_devices() == [0, 1]
    assert of_device(0).owns(first)
    assert of_device(1).owns(second)
    assert of_device(0).pool.stats()["budget_bytes"] == 64 * MIB
    give(first)
    give(second)
    assert not any(_core.torch_entry_errors().values())


def statistics_are_ours() -> None:
    install(devices=2)
    from torch.cuda import memory_allocated as imported_before

    allocator.enable(budget_bytes=64 * MIB)
    assert torch.cuda.memory_allocated() == 0  # CUDA is not in use
    a, b = take(5 * MIB), take(1000)
    live = 5 * MIB + 1024
    devices: list[Any] = [None, 0, "cuda", "cuda:0", torch.device("cuda", 0), torch.device("cuda")]
    for device in devices:
        assert torch.cuda.memory_allocated(device) == imported_before(device) == live
    assert torch.cuda.memory_allocated(1) == 0
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.memory_stats(7)
    reserved = torch.cuda.memory_reserved()
    assert live <= reserved <= 8 * MIB
    assert reserved % (2 * MIB) == 0
    give(a)
    assert torch.cuda.memory_allocated() == 1024
    assert torch.cuda.max_memory_allocated() == live
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 1024
    stats = torch.cuda.memory_stats()
    assert stats["allocation.all.allocated"] == 2
    assert stats["allocation.large_pool.current"] == 0
    assert stats["allocation.small_pool.current"] == 1
    assert stats["requested_bytes.all.current"] == 1000
    assert stats["num_ooms"] == 0
    assert stats["num_device_alloc"] > 0
    assert set(stats) == documented_keys()
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == 0
    assert "CUDA OOMs: 0" in torch.cuda.memory_summary()
    assert torch.cuda.memory_summary(abbreviated=True)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 2 * MIB
    assert torch.cuda.max_memory_reserved() == reserved
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    assert sum(s["total_size"] for s in segments) == 2 * MIB
    torch.cuda.set_per_process_memory_fraction(0.25)
    assert of_device().figures()["limit_bytes"] == 64 * MIB
    assert torch.cuda.get_per_process_memory_fraction() == 0.25
    give(b)
    stats_of_ours = allocator.stats()
    assert stats_of_ours.live_bytes == 0
    assert stats_of_ours.budget_bytes == 64 * MIB
    assert stats_of_ours.allocations == 0
    assert stats_of_ours.bad_frees == _core.torch_entry_errors()
    with pytest.raises(RuntimeError, match="no allocator"):
        allocator.stats(1)


def documented_keys() -> set[str]:
    """Of ``torch.cuda.memory_stats``."""
    names = "allocation segment active inactive_split allocated_bytes reserved_bytes active_bytes"
    names += " inactive_split_bytes requested_bytes"
    values = ("current", "peak", "allocated", "freed")
    keys = {f"{n}.{k}.{v}" for n in names.split() for k in KINDS for v in values}
    keys |= {f"{n}.{v}" for n in ("oversize_allocations", "oversize_segments") for v in values}
    keys |= {"num_alloc_retries", "num_ooms", "max_split_size", "num_sync_all_streams"}
    return keys | {"num_device_alloc", "num_device_free"}


KINDS = ("all", "small_pool", "large_pool")


def disable_restores_everything() -> None:
    install()
    names = ("_cuda_memoryStats", "_cuda_resetPeakMemoryStats", "_cuda_getCheckpointState")
    before = {name: getattr(torch._C, name) for name in names}
    for _ in range(2):
        allocator.enable()
        assert all(getattr(torch._C, name) is not before[name] for name in names)
        allocator.disable()
        FAKE.sync()
        assert FAKE.current is FAKE.native
        assert not allocator.is_enabled()
        assert all(getattr(torch._C, name) is before[name] for name in names)
        pools: list[Any] = [torch.cuda.MemPool, torch.cuda.memory.MemPool]
        assert pools == [MemPool, MemPool]
    assert torch._C._cuda_memoryStats(0) == NATIVE_STATS
    with pytest.raises(RuntimeError, match="not enabled"):
        allocator.disable()
    allocator.enable()
    take(512)
    with pytest.raises(RuntimeError, match="Start a new process"):
        allocator.disable()
    assert torch.cuda.memory_allocated() == 512


def no_way_back_is_told() -> None:
    from vattn.allocator import torch_hooks

    install()
    torch_hooks._current_pointer = lambda: None
    allocator.enable()
    with pytest.raises(RuntimeError, match="no way back"):
        allocator.disable()
    assert allocator.is_enabled()


def bad_calls_of_enable() -> None:
    install()
    bad: dict[str, Any]
    for bad in ({"budget_bytes": "much"}, {"page_bytes": 0}, {"ahead_bytes": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            allocator.enable(**bad)
    os.environ["VATTN_BUDGET"] = "lots"
    with pytest.raises(ValueError, match="VATTN_BUDGET='lots'"):
        allocator.enable()
    os.environ["VATTN_BUDGET"] = "48MiB"
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    with pytest.warns(UserWarning, match="expandable_segments:True"):
        allocator.enable()
    with pytest.raises(RuntimeError, match="enabled already"):
        allocator.enable()
    take(512)
    assert of_device().pool.stats()["budget_bytes"] == 48 * MIB


def the_default_budget_leaves_a_reserve() -> None:
    install()
    allocator.enable()
    take(512)
    assert of_device().pool.stats()["budget_bytes"] == 256 * MIB * 15 // 16


def too_late() -> None:
    install()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="uses CUDA already"):
        allocator.enable()
    assert not allocator.is_enabled()
    assert torch._C._cuda_memoryStats(0) == NATIVE_STATS


def an_unknown_torch_is_refused() -> None:
    install()
    faults: list[tuple[Callable[[], None], str]] = [
        (lambda: setattr(Pluggable, "__init__", without("set_release_pool")), "set_release_pool"),
        (lambda: delattr(torch._C, "_cuda_resetPeakMemoryStats"), "_cuda_resetPeakMemoryStats"),
        (lambda: delattr(torch._C, "_cuda_customAllocator"), "without CUDA"),
    ]
    for broken, message in faults:
        broken()
        with pytest.raises(RuntimeError, match=message):
            allocator.enable()
        FAKE.sync()
        assert FAKE.current is FAKE.native
        assert not allocator.is_enabled()
    assert _core.find_torch_errors(["/no/libc10.so"]) != []


def without(setter: str) -> Callable[..., None]:
    original = Pluggable.__init__

    def init(self: Pluggable, alloc: int, free: int) -> None:
        original(self, alloc, free)
        delattr(self, setter)

    return init


def what_cannot_work_says_so() -> None:
    install()
    allocator.enable()
    with pytest.raises(RuntimeError, match=r"vattn\.allocator\.pool"):
        torch.cuda.MemPool()
    with pytest.raises(RuntimeError, match=r"vattn\.allocator\.pool"):
        torch.cuda.use_mem_pool(None)  # type: ignore[arg-type]
    for name in ("_cuda_checkPoolLiveAllocations", "_cuda_getCheckpointState"):
        with pytest.raises(RuntimeError, match="reduce-overhead"):
            getattr(torch._C, name)(0, (0, 1))
    with pytest.raises(ValueError, match="device=0"), allocator.pool("x", device=0):
        pass


def tags_under_enable() -> None:
    install()
    allocator.enable(budget_bytes=64 * MIB)
    allocator.set_budget("weights", "16MiB")
    with allocator.pool(tag="weights"):
        a = take(8 * MIB)
        with allocator.pool("cache"):
            b = take(4 * MIB)
            with allocator.pool():
                c = take(2 * MIB)
        d = take(4 * MIB)
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(take(MIB)))
        thread.start()
        thread.join()
    e = take(2 * MIB)
    live = {n: of_device().tag_live_bytes(_core.tag_id(n)) for n in ("weights", "cache")}
    assert live == {"weights": 12 * MIB, "cache": 4 * MIB}
    assert _core.current_tag() == 0
    reserved = torch.cuda.memory_reserved()
    allocator.pause("weights")
    assert allocator.is_paused("weights")
    assert not allocator.is_paused("cache")
    assert torch.cuda.memory_reserved() <= reserved - 12 * MIB
    with pytest.raises(ValueError, match="paused"):
        allocator.pause("weights")
    pinned = FAKE.cudart.times
    assert list(FAKE.cudart.locked.values()) == [12 * MIB]  # not 16: no power of two
    allocator.resume("weights", device="cuda:0")
    assert FAKE.cudart.locked == {}
    allocator.pause("weights", pinned=False)
    allocator.resume("weights")
    assert FAKE.cudart.times == pinned
    with pytest.raises(ValueError, match="not paused"):
        allocator.resume("weights")
    with pytest.raises(ValueError, match="cache, weights"):
        allocator.pause("wieghts")
    with pytest.raises(ValueError, match="pinned=True"):
        allocator.pause("weights", backup=False, pinned=True)
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="keep_bytes"):
            allocator.trim(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget_bytes"):
        allocator.set_budget("weights", "many")
    with pytest.raises(TypeError, match="tag=3"), allocator.pool(3):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="name"), allocator.pool(""):
        pass
    for address in (a, b, c, d, e, *other):
        give(address)
    assert allocator.trim() > 0
    assert torch.cuda.memory_reserved() == 0


def pools_without_enable() -> None:
    install(devices=2)
    os.environ["VATTN_BUDGET"] = "96MiB"
    with allocator.pool("weights"):
        a = take(3 * MIB)
        with allocator.pool("cache"):
            b = take(MIB)
            with allocator.pool("weights"):
                c = take(MIB)
            with allocator.pool("weights", device="cuda:1"):
                d = take(MIB, device=1)
                e = take(MIB)  # on device 0, where "cache" is the innermost
        f = take(MIB)
    assert FAKE.recording == []
    live = {n: of_device().tag_live_bytes(_core.tag_id(n)) for n in ("weights", "cache")}
    assert live == {"weights": 8 * MIB, "cache": 4 * MIB}
    assert of_device(1).tag_live_bytes(_core.tag_id("weights")) == 2 * MIB
    assert MemPool.made == 3
    assert of_device().pool.stats()["budget_bytes"] == 96 * MIB
    assert torch._C._cuda_memoryStats(0) == NATIVE_STATS
    assert not allocator.is_enabled()
    # Two threads at once, in the pool of one tag.
    barrier, wrong = threading.Barrier(2), []

    def work() -> None:
        try:
            with allocator.pool("weights"):
                barrier.wait()
                address = take(MIB)
                barrier.wait()
            give(address)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # No memory: a null, for which PyTorch has its own way.
    with allocator.pool("weights"):
        assert take(512 * MIB) == 0
    allocator.pause("weights")
    allocator.resume("weights")
    for address in (a, b, c, d, e, f):
        give(address)
    assert not any(_core.torch_entry_errors().values())
    with pytest.raises(RuntimeError, match="uses CUDA already"):
        allocator.enable()
    with pytest.raises(ValueError, match="cpu"), allocator.pool("weights", device="cpu"):
        pass


def one_pool_for_caches() -> None:
    install()
    from vattn import KVCache, PagePool

    shape: Any = {"kv_heads": 2, "head_dim": 64, "dtype": torch.float16, "max_seqs": 2}
    torch.cuda.is_available = lambda: False  # the fake GPU has no name to look up defaults by
    allocator.enable(budget_bytes=64 * MIB)
    with KVCache(2, max_tokens=4096, device="cuda:0", **shape) as cache:
        assert cache.pool.core is of_device().pool
        assert cache.pool.device == torch.device("cuda", 0)
        slot = cache.open()
        cache.ensure(slot, 4096, stream=0)
        held = take(8 * MIB)
        assert of_device().pool.stats()["used_bytes"] >= 12 * MIB
        cache.release(slot, stream=0)
        give(held)
    with pytest.raises(ValueError, match="budget_bytes=1048576"):
        KVCache(2, max_tokens=4096, device="cuda:0", budget_bytes=MIB, **shape)
    apart = PagePool("cuda:0", budget_bytes=8 * MIB)
    with KVCache(2, max_tokens=1024, pool=apart, **shape) as cache:
        assert cache.pool is apart
    with KVCache(2, max_tokens=1024, **shape) as cache:  # on the CPU
        assert cache.pool.core is not of_device().pool
    assert allocator.page_pool(0).core is of_device().pool


CASES = (
    enable_wires_every_hook,
    statistics_are_ours,
    disable_restores_everything,
    no_way_back_is_told,
    bad_calls_of_enable,
    the_default_budget_leaves_a_reserve,
    too_late,
    an_unknown_torch_is_refused,
    what_cannot_work_says_so,
    tags_under_enable,
    pools_without_enable,
    one_pool_for_caches,
)
