"""CUDA graphs, streams, threads, memory, an engine and refusals under vattn.allocator.enable().

Each scenario is a function of tests/gpu/allocator_scripts, in a process of its own. Starting one
takes seconds, so a few run side by side: those that do not depend on how much the device has free.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.gpu.allocator_scripts.spawn import DEVICE, output_of, scenario, spawn

SCENARIOS = {
    "graphs": (
        *("replay_beside_others", "graphed_callables", "shared_pool"),
        "out_of_memory_in_a_capture",
    ),
    "streams": ("record_stream", "memory_of_another_stream", "threads", "loader"),
    "memory": ("out_of_memory", "fraction"),
    "serving": ("one_pool", "one_pool_with_graphs", "swaps_with_pause"),
    "refused": ("too_late", "twice", "undone", "mem_pool", "graph_trees"),
}
ALL = [(module, name) for module, names in SCENARIOS.items() for name in names]
# Of CPU tensors, through tests/torch_bridge.
REHEARSED = {"threads", "loader", "out_of_memory", "one_pool", "swaps_with_pause"}
SIDE_BY_SIDE = {"cuda": 4, "cpu": 1}
KINDS = ("current", "peak", "allocated", "freed")
MIB = 1 << 20

Scenario = tuple[str, str]


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[dict[Scenario, Future[Any]]]:
    """The scenarios that this run has selected."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = [call.params["which"] for call in calls if call and "which" in call.params]
    if DEVICE != "cuda":
        chosen = [which for which in chosen if which[1] in REHEARSED]
    workers = ThreadPoolExecutor(SIDE_BY_SIDE[DEVICE])
    try:
        yield {which: workers.submit(scenario, *which, DEVICE) for which in chosen}
    finally:
        workers.shutdown(cancel_futures=True)


@pytest.mark.parametrize("which", ALL, ids="-".join)
def test_scenario(which: Scenario, started: dict[Scenario, Future[Any]]) -> None:
    if which not in started:
        pytest.skip("needs CUDA")
    assert started[which].result() is None


def test_pause(device: str, started: dict[Scenario, Future[Any]]) -> None:
    """By what the driver says is free: with no other process beside it."""
    for each in started.values():
        each.exception()
    scenario("memory", "pause", device)


def test_the_run_of_memcheck_without_the_tool(device: str) -> None:
    said = output_of(spawn("-m", "bench.gpu.memcheck_allocator", "--run", "--device", device))
    assert '{"steps": 6' in said


def test_figures_are_those_of_pytorch(device: str) -> None:
    """torch.cuda.memory_* of one program: counts and requested bytes are the same numbers."""
    if device != "cuda":
        pytest.skip("needs CUDA")
    native, ours = (scenario("memory", "figures", device, way) for way in ("native", "enable"))
    for before, after in zip(native["points"], ours["points"], strict=True):
        assert_same_requests(before, after)
        assert_sound(after)
    # cuBLAS's workspace is left; where it lies, pages are begun at both ends.
    left, most = (each["points"][-1]["memory_reserved"] for each in (ours, native))
    assert left <= most + 4 * MIB
    assert ours["given_back"] > 0, "empty_cache() gave nothing back"
    assert set(native["keys"]) <= set(ours["keys"])
    assert native["summary"] == ours["summary"]
    assert {"address", "total_size", "blocks", "stream"} <= set(ours["segment_keys"])


def assert_same_requests(native: dict[str, int], ours: dict[str, int]) -> None:
    for name in ("allocation.all", "requested_bytes.all"):
        keys = [f"{name}.{kind}" for kind in KINDS]
        assert {key: ours[key] for key in keys} == {key: native[key] for key in keys}
    # PyTorch leaves the rest of some blocks unused, and counts it.
    for key in ("memory_allocated", "max_memory_allocated"):
        assert ours[key] <= native[key], key


def assert_sound(figures: dict[str, Any]) -> None:
    """Requested bytes are rounded up to 512, and physical memory holds what is allocated."""
    requested, count = figures["requested_bytes.all.current"], figures["allocation.all.current"]
    allocated = figures["memory_allocated"]
    assert requested <= allocated <= requested + 512 * count
    assert allocated == figures["allocated_bytes.all.current"]
    assert figures["memory_reserved"] >= allocated
    assert figures["max_memory_allocated"] >= allocated
