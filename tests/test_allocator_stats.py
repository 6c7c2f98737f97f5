"""Statistics, snapshots and recordings of ``vattn.allocator`` on a torch with CUDA (fake_torch.py).

Each case runs in a process of its own: torch's allocator is swapped once.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vattn
from tests.door_cases import give, of_device, take
from tests.fake_torch import FAKE, MIB, NATIVE_STATS, install
from vattn import allocator
from vattn.allocator import torch_settings

if TYPE_CHECKING:
    from tests.own_process import Template

pytest_plugins = ("tests.own_process",)

ACCELERATOR = (
    "_accelerator_getDeviceStats",
    "_accelerator_resetPeakStats",
    "_accelerator_resetAccumulatedStats",
    "_accelerator_isAllocatorInitialized",
    "_accelerator_emptyCache",
)


def a_program_is_recorded_from_its_first_request() -> None:
    install(devices=2)
    allocator.enable(budget_bytes=64 * MIB)
    allocator.record_trace(max_events=100)
    first = take(3 * MIB)
    give(first)
    events = [e for e in allocator.trace().events if not e.action.startswith("segment")]
    assert [event.action for event in events] == ["alloc", "free_requested", "free_completed"]
    assert {(event.address, event.bytes) for event in events} == {(first, 3 * MIB)}
    assert all(isinstance(event, allocator.Event) for event in events)
    allocator.record_trace(device="cuda:1")
    second = take(MIB, device=1)
    assert any(e.address == second for e in allocator.trace(device=1).events)
    with pytest.raises(RuntimeError, match=r"no cuda:2: PyTorch sees 2"):
        allocator.record_trace(device=2)


def reports_before_the_first_tensor_say_so() -> None:
    install()
    for report in REPORTS:
        with pytest.raises(RuntimeError, match=r"cuda:0; call vattn.allocator.enable\(\)"):
            report()
    allocator.enable(budget_bytes=64 * MIB)
    for report in REPORTS:
        with pytest.raises(RuntimeError, match=r"cuda:0 yet, since nothing was allocated there"):
            report()
        with pytest.raises(RuntimeError, match=r"no cuda:1: PyTorch sees 1"):
            report(device=1)
        for bad in (True, -1, "gpu", "cpu"):
            with pytest.raises(ValueError, match=f"device={bad}"):
                report(device=bad)
    allocator.disable()  # none of them opened the device
    allocator.enable(budget_bytes=64 * MIB)
    give(take(MIB))
    for report in REPORTS:
        assert report() is not None


REPORTS: tuple[Any, ...] = (allocator.stats, allocator.snapshot, allocator.trace)


def torch_accelerator_is_answered() -> None:
    install(devices=2)
    c: Any = torch._C
    answers = (NATIVE_STATS, None, None, True, None)
    for name, answer in zip(ACCELERATOR, answers, strict=True):
        setattr(c, name, FAKE.only_native(name, answer))
    before = {name: getattr(c, name) for name in ACCELERATOR}
    allocator.enable(budget_bytes=64 * MIB)
    accelerator = torch.accelerator.memory
    assert accelerator.memory_allocated(0) == 0  # CUDA is not in use
    accelerator.empty_cache()
    a, b = take(5 * MIB), take(1000)
    assert accelerator.memory_allocated(0) == torch.cuda.memory_allocated(0) == 5 * MIB + 1024
    assert accelerator.memory_allocated(1) == 0
    give(a)
    assert accelerator.max_memory_allocated(0) == 5 * MIB + 1024
    accelerator.reset_peak_memory_stats(0)
    assert accelerator.max_memory_allocated(0) == 1024
    assert accelerator.memory_stats(0) == torch.cuda.memory_stats(0)
    accelerator.reset_accumulated_memory_stats(0)
    assert accelerator.memory_stats(0)["allocation.all.allocated"] == 0
    assert accelerator.memory_reserved(0) > 2 * MIB
    accelerator.empty_cache()
    assert accelerator.memory_reserved(0) == 2 * MIB
    give(b)
    assert all(getattr(c, name) is not before[name] for name in ACCELERATOR)


def a_torch_without_those_does_too() -> None:
    install()
    for name in ACCELERATOR:
        if hasattr(torch._C, name):
            delattr(torch._C, name)
    allocator.enable(budget_bytes=64 * MIB)
    give(take(MIB))
    assert not any(hasattr(torch._C, name) for name in ACCELERATOR)


def snapshots_by_pool_with_and_without_traces() -> None:
    install()
    allocator.enable(budget_bytes=64 * MIB)
    allocator.record_trace()
    address = take(3 * MIB)
    ask: Any = torch._C._cuda_memorySnapshot
    for what in (None, (0, 0), (0, 0, True), (0, 0, False), (0, 7), (0, 7, True)):
        found = ask(what)
        assert bool(found["segments"]) == (what is None or what[:2] == (0, 0)), what
        traced = what is None or what[2:] != (False,)
        assert bool(found["device_traces"][0]) == traced, what
    give(address)


def a_memory_fraction_is_given_back_as_it_was_set() -> None:
    install(devices=2)
    original = torch._C._cuda_setMemoryFraction
    allocator.enable(budget_bytes=64 * MIB)
    take(MIB)
    take(MIB, device=1)
    for fraction in (0.9, 0.25, 0.123):
        torch.cuda.set_per_process_memory_fraction(fraction)
        assert torch.cuda.get_per_process_memory_fraction() == fraction
        limit = of_device().figures()["limit_bytes"]
        assert fraction * 256 * MIB - 2 * MIB < limit <= fraction * 256 * MIB
        assert torch.cuda.get_per_process_memory_fraction(1) == 1.0
    of_device().set_limit(64 * MIB)  # by another way
    assert torch.cuda.get_per_process_memory_fraction() == 0.25
    assert torch._C._cuda_setMemoryFraction is not original


def patches_of_a_torch_that_lacks_something_are_undone() -> None:
    install()
    from vattn.allocator import torch_hooks

    before = torch._C._cuda_memoryStats
    cuda: Any = torch.cuda
    del cuda.use_mem_pool
    with pytest.raises(AttributeError, match="use_mem_pool"):
        torch_hooks.patch_torch()
    assert torch._C._cuda_memoryStats is before


def settings_without_effect_are_told() -> None:
    install()
    c: Any = torch._C
    calls: list[Any] = []
    names = (
        "_cuda_cudaCachingAllocator_set_allocator_settings",
        "_accelerator_setAllocatorSettings",
        "_cuda_cudaCachingAllocator_enable",
    )
    for name in names:
        setattr(c, name, calls.append)
    allocator.enable()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    for name in names[:2]:
        with pytest.warns(UserWarning, match=r"^expandable_segments:True is for .*no effect") as w:
            getattr(c, name)("pinned_use_cuda_host_register:True,expandable_segments:True")
        assert len(w) == 1
    with pytest.warns(UserWarning, match=r"caching_allocator_enable\(False\)"):
        torch.cuda.memory.caching_allocator_enable(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names[:2]:
            getattr(c, name)("pinned_num_register_threads:8")
        torch.cuda.memory.caching_allocator_enable(True)
    assert len(calls) == 6
    assert calls[-1] is True


def settings_of_the_environment_are_told() -> None:
    for value, idle in (
        ("expandable_segments:True", "expandable_segments:True"),
        ("pinned_num_register_threads:8, max_split_size_mb:64", "max_split_size_mb:64"),
        (
            "roundup_power2_divisions:[256:1,512:2,>:8],pinned_x:1",
            "roundup_power2_divisions:[256:1,",
        ),
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = value
        with pytest.warns(UserWarning, match="no effect") as told:
            torch_settings.warn_of_environment()
        (message,) = [str(each.message) for each in told]
        assert message.startswith(f"PYTORCH_ALLOC_CONF: {idle}")
        assert "pinned" not in message
    os.environ["PYTORCH_ALLOC_CONF"] = "pinned_use_cuda_host_register:True"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_settings.warn_of_environment()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with pytest.warns(UserWarning, match="PYTORCH_NO_CUDA_MEMORY_CACHING"):
        torch_settings.warn_of_environment()


def a_page_size_that_cannot_be_is_refused_at_once() -> None:
    install()
    for page in (12345, 65536 + 512, 2 * MIB + 4096):
        with pytest.raises(ValueError, match=f"page_bytes={page} .* 2 MiB on "):
            allocator.enable(page_bytes=page)
        assert not allocator.is_enabled()
    allocator.enable(page_bytes=4 * MIB)
    give(take(MIB))
    assert allocator.stats().page_bytes == 4 * MIB


def reserve_shares_the_pool() -> None:
    install()
    allocator.enable(budget_bytes=64 * MIB)
    with pytest.raises(ValueError, match=r"page_bytes=2097152 .* one for all of cuda:0"):
        vattn.reserve((4, 4), torch.uint8, "cuda:0", page_bytes=2 * MIB)


def a_fork_of_a_program_with_cuda_is_refused() -> None:
    install()
    torch.cuda._is_in_bad_fork = lambda: True
    with pytest.raises(RuntimeError, match="uses CUDA already"):
        allocator.enable()
    assert not allocator.is_enabled()


CASES = (
    a_program_is_recorded_from_its_first_request,
    reports_before_the_first_tensor_say_so,
    torch_accelerator_is_answered,
    a_torch_without_those_does_too,
    snapshots_by_pool_with_and_without_traces,
    a_memory_fraction_is_given_back_as_it_was_set,
    patches_of_a_torch_that_lacks_something_are_undone,
    settings_without_effect_are_told,
    settings_of_the_environment_are_told,
    a_page_size_that_cannot_be_is_refused_at_once,
    reserve_shares_the_pool,
    a_fork_of_a_program_with_cuda_is_refused,
)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_statistics(own_process: Template, case: str) -> None:
    own_process.run_case("tests.test_allocator_stats", case)
