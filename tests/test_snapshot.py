"""Snapshots that PyTorch's tools and memory page open, and traces that the benchmark replays."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.alloc_traces.trace_file import AllocTrace
from tests.fake_cuda.fake import FakeCuda
from tests.memory_page import Page, PageStopped, assert_unpickles
from vattn import _core
from vattn.allocator.event_trace import record_trace, save_trace, trace
from vattn.allocator.memory_snapshot import dump_snapshot, snapshot
from vattn.allocator.which import allocator_of

viz: Any = importlib.import_module("torch.cuda._memory_viz")  # it has no types
MIB = 1 << 20
PAGES = 24


@pytest.fixture
def stream(driver: _core.Driver, request: pytest.FixtureRequest) -> Iterator[int]:
    """A stream that outlives the allocator, which asks it whether its work is done."""
    stream = driver.create_stream()
    yield stream
    request.node.funcargs.pop("allocator")
    driver.destroy_stream(stream)


@pytest.fixture
def allocator(driver: _core.Driver, stream: int) -> _core.CachingAllocator:
    """An allocator over 24 pages of 2 MiB, or of the smallest size on the host."""
    page = driver.granularity()
    pool = _core.PagePool(driver, page_bytes=page, budget_bytes=PAGES * page)
    return _core.CachingAllocator(pool)


def page_bytes(allocator: _core.CachingAllocator) -> int:
    return int(allocator.pool.page_bytes)


def device_of(allocator: _core.CachingAllocator) -> int:
    return int(allocator.pool.driver.name().partition(":")[2] or 0)


def assert_page_opens(content: dict[str, Any], device: int) -> None:
    for joins in (True, False):
        Page(content, device, joins=joins).play_back()
    assert_unpickles(pickle.dumps(content, protocol=4))


def churn(allocator: _core.CachingAllocator, seed: int, stream: int) -> list[int]:
    """400 requests and releases under two tags, with pauses; what is live at the end."""
    rng = random.Random(seed)
    page = page_bytes(allocator)
    tags = [0, _core.tag_id("acts"), _core.tag_id("weights")]
    streams = [0, stream] if seed % 2 else [0]
    live: list[int] = []
    for _ in range(400):
        if live and rng.random() < 0.45:
            allocator.free(live.pop(rng.randrange(len(live))))
            continue
        _core.set_current_tag(rng.choice(tags))
        size = rng.choice([100, 2000, page // 3, page, 3 * page + 77])
        with contextlib.suppress(_core.OutOfMemory):
            live.append(allocator.allocate(size, rng.choice(streams)))
        _core.set_current_tag(0)
        if rng.random() < 0.05:
            allocator.pause(tags[1], backup=True)
            with contextlib.suppress(_core.OutOfMemory):
                allocator.resume(tags[1])
        if allocator.is_paused(tags[1]):
            for address in live:
                allocator.free(address)
            live = []
            allocator.resume(tags[1])
        if rng.random() < 0.05:
            allocator.trim()
    return live


# Snapshots --------------------------------------------------------------------------------------


def test_segments_are_as_in_torch(allocator: _core.CachingAllocator) -> None:
    page = page_bytes(allocator)
    small = allocator.allocate(100)
    large = allocator.allocate(2 * page + 1)
    _core.set_current_tag(_core.tag_id("weights"))
    tagged = allocator.allocate(page)
    _core.set_current_tag(0)

    content = snapshot(allocator=allocator)
    blocks = {
        block["address"]: (segment, block)
        for segment in content["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    assert set(blocks) == {small, large, tagged}
    _, block = blocks[large]
    assert block["requested_size"] == 2 * page + 1
    assert block["size"] == 2 * page + 512
    assert block["frames"] == []
    segment, block = blocks[tagged]
    assert [frame["name"] for frame in block["frames"]] == ["weights"]
    assert segment["allocated_size"] == segment["active_size"] == page
    assert segment["requested_size"] == page
    for segment in content["segments"]:
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            at += block["size"]
        assert at == segment["address"] + segment["total_size"]
        states = [block["state"] for block in segment["blocks"]]
        assert ("inactive", "inactive") not in itertools.pairwise(states)
    reserved = content["vattn"]["figures"]["all"]["reserved_bytes"]["current"]
    assert sum(segment["total_size"] for segment in content["segments"]) == reserved
    assert content["device_traces"][-1] == []  # nothing was recorded


def test_torch_reads_it(allocator: _core.CachingAllocator, stream: int) -> None:
    allocator.record(10_000)
    kept = churn(allocator, 3, stream)
    content = snapshot(allocator=allocator)
    device = device_of(allocator)
    assert f"segments: {len(content['segments'])}\n" in viz.segsum(content)
    text = viz.trace(content)
    assert f"{len(content['device_traces'][device])} entries" in text
    assert "del a #" in text
    lines = viz.memory(content, format_flamegraph=lambda text: text)
    assert "active_allocated;vattn tag:0:weights" in lines
    viz.segments(content, format_flamegraph=lambda text: text)
    for plot in (viz.trace_plot, viz.segment_plot):
        assert "base64" in plot(content)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        viz.trace_plot(content, filter_freed=True)
    assert "without free_requested" not in printed.getvalue()
    assert kept


def test_command_line_of_torch(
    tmp_path: Path, allocator: _core.CachingAllocator, stream: int
) -> None:
    allocator.record(1000)
    churn(allocator, 1, stream)
    path = tmp_path / "snapshot.pickle"
    dump_snapshot(path, allocator=allocator)
    assert_unpickles(path.read_bytes())
    html = tmp_path / "x.html"
    module = "torch.cuda._memory_viz"
    command = [sys.executable, "-m", module, "trace_plot", str(path), "-o", str(html)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert "Active Memory Timeline" in html.read_text()


@pytest.mark.parametrize("max_events", [7, 60, 100_000])
@pytest.mark.parametrize("seed", range(4))
def test_page_plays_it_back(
    allocator: _core.CachingAllocator, stream: int, seed: int, max_events: int
) -> None:
    allocator.record(max_events)
    churn(allocator, seed, stream)
    content = snapshot(allocator=allocator)
    device = device_of(allocator)
    assert_page_opens(content, device)
    traced = content["device_traces"][device]
    recorded = trace(allocator)
    # Events of blocks are all there; those of segments may be cut.
    for action in ("alloc", "free_requested", "free_completed"):
        seen = [each["addr"] for each in traced if each["action"] == action]
        assert seen == [each.address for each in recorded.events if each.action == action]
    assert content["vattn"]["dropped_events"] == recorded.dropped
    if max_events == 100_000:
        page = Page(content, device, joins=True)
        page.play_back()
        assert page.blocks == {}  # back to before the first event
        assert page.draw() == 0


def test_blocks_from_before_the_recording(allocator: _core.CachingAllocator) -> None:
    page = page_bytes(allocator)
    before = [allocator.allocate(page) for _ in range(4)]
    allocator.record(100)
    for address in before[:2]:
        allocator.free(address)
    allocator.trim()
    content = snapshot(allocator=allocator)
    device = device_of(allocator)
    assert_page_opens(content, device)
    replay = Page(content, device, joins=True)
    replay.play_back()
    assert sorted(replay.blocks) == sorted(before)


@pytest.mark.parametrize("driver_kind", ["cuda_fake"], indirect=True)
@pytest.mark.parametrize("bytes_asked", [700, MIB])
def test_block_that_another_stream_uses(
    allocator: _core.CachingAllocator, stream: int, fake_cuda: FakeCuda, bytes_asked: int
) -> None:
    allocator.record(100)
    address = allocator.allocate(bytes_asked)
    with fake_cuda.held(stream):
        fake_cuda.launch(stream, [(address, bytes_asked)])
        allocator.record_stream(address, stream)
        allocator.free(address)
        content = snapshot(allocator=allocator)
    assert_page_opens(content, device_of(allocator))
    (found,) = [s for s in content["segments"] if s["active_size"] > 0]
    (block,) = [b for b in found["blocks"] if b["state"] == "active_pending_free"]
    assert block["address"] == address
    assert found["allocated_size"] == 0
    assert found["active_size"] == block["size"]
    assert content["device_traces"][-1][-1]["action"] == "free_requested"


def test_pause_and_out_of_memory_are_told(allocator: _core.CachingAllocator) -> None:
    page = page_bytes(allocator)
    tag = _core.tag_id("acts")
    allocator.record(100)
    _core.set_current_tag(tag)
    allocator.allocate(page)
    _core.set_current_tag(0)
    allocator.pause(tag, backup=False)
    allocator.resume(tag)
    with pytest.raises(_core.OutOfMemory):
        allocator.allocate((PAGES + 1) * page)
    content = snapshot(allocator=allocator)
    assert_page_opens(content, device_of(allocator))
    assert [each["action"] for each in content["vattn"]["pauses"]] == ["pause", "resume"]
    assert content["vattn"]["pauses"][0]["tag"] == "acts"
    (oom,) = [each for each in content["device_traces"][-1] if each["action"] == "oom"]
    assert oom["size"] == (PAGES + 1) * page
    assert "device_free" in oom
    assert "OutOfMemoryError" in viz.trace(content)


def test_the_model_of_the_page_stops_where_the_page_does(
    allocator: _core.CachingAllocator,
) -> None:
    allocator.record(100)
    address = allocator.allocate(page_bytes(allocator))
    allocator.free(address)
    allocator.trim()
    content = snapshot(allocator=allocator)
    device = device_of(allocator)
    events = content["device_traces"][device]
    assert [each["action"] for each in events][-1] == "segment_unmap"
    for broken in (events[:-1], [each for each in events if each["action"] != "free_completed"]):
        with pytest.raises(PageStopped):
            Page(
                {**content, "device_traces": [broken] * (device + 1)}, device, joins=True
            ).play_back()


# Traces -----------------------------------------------------------------------------------------


def test_trace_of_events(allocator: _core.CachingAllocator) -> None:
    record_trace(allocator, max_events=100)
    _core.set_current_tag(_core.tag_id("acts"))
    address = allocator.allocate(1000)
    _core.set_current_tag(0)
    allocator.free(address)
    recorded = trace(allocator)
    calls = [each for each in recorded.events if not each.action.startswith("segment")]
    assert [each.action for each in calls] == ["alloc", "free_requested", "free_completed"]
    assert {(each.address, each.bytes, each.tag) for each in calls} == {(address, 1000, "acts")}
    assert recorded.dropped == 0
    times = [each.time_us for each in recorded.events]
    assert times == sorted(times)
    record_trace(allocator, max_events=0)
    allocator.allocate(1000)
    assert trace(allocator).events == ()


def test_old_events_are_dropped(allocator: _core.CachingAllocator) -> None:
    record_trace(allocator, max_events=3)
    for _ in range(5):
        allocator.free(allocator.allocate(700))
    recorded = trace(allocator)
    assert len(recorded.events) == 3
    assert recorded.dropped >= 12
    assert recorded.events[-1].action == "free_completed"


@pytest.mark.parametrize("max_events", [50, 100_000])
def test_benchmark_loads_a_trace(
    tmp_path: Path, allocator: _core.CachingAllocator, stream: int, max_events: int
) -> None:
    early = allocator.allocate(5000)
    record_trace(allocator, max_events=max_events)
    allocator.free(early)
    kept = churn(allocator, 2, stream)
    path = tmp_path / "mine.npz"
    save_trace(path, allocator)
    loaded = AllocTrace.load(path)
    recorded = trace(allocator)
    calls = [e for e in recorded.events if e.action in ("alloc", "free_requested")]
    assert loaded.name == "mine"
    assert loaded.meta["dropped"] == recorded.dropped
    assert loaded.operations == len(calls) - loaded.meta["unknown_releases"]
    assert loaded.sizes[loaded.sizes > 0].tolist() == [
        e.bytes for e in calls if e.action == "alloc"
    ]
    if max_events == 100_000:
        assert loaded.meta["unknown_releases"] == 1
        live = allocator.figures()["all"]["allocated_bytes"]["current"]
        assert loaded.live_at_end == live
        assert len(kept) == int((loaded.sizes > 0).sum() * 2 - loaded.operations)
    else:
        assert loaded.meta["unknown_releases"] > 1


@pytest.mark.parametrize("bad", [-1, 1.5, "many", True])
def test_bad_number_of_events(allocator: _core.CachingAllocator, bad: Any) -> None:
    with pytest.raises(ValueError, match="max_events="):
        record_trace(allocator, max_events=bad)


def test_empty_trace_is_not_saved(tmp_path: Path, allocator: _core.CachingAllocator) -> None:
    with pytest.raises(ValueError, match="record while the program allocates"):
        save_trace(tmp_path / "x.npz", allocator)


@pytest.mark.parametrize("driver_kind", ["host"], indirect=True)
def test_more_streams_than_a_file_numbers(
    tmp_path: Path, allocator: _core.CachingAllocator
) -> None:
    record_trace(allocator, max_events=10_000)
    for stream in range(257):
        allocator.free(allocator.allocate(100, stream))
        allocator.trim()
    with pytest.raises(ValueError, match="has 257 streams"):
        save_trace(tmp_path / "x.npz", allocator)


# Which allocator --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [snapshot, trace, record_trace])
def test_needs_an_allocator(call: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=r"cuda:5.*enable\(\)"):
        call(device=5)
    with pytest.raises(ValueError, match="device=cpu is not a CUDA device"):
        call(device="cpu")


def test_allocator_in_charge(
    allocator: _core.CachingAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "torch_allocator", {6: allocator}.get)
    assert allocator_of("cuda:6") is allocator
    assert snapshot(6)["segments"] == []
    with pytest.raises(ValueError, match="leave one of them out"):
        allocator_of(6, allocator)
    with pytest.raises(RuntimeError, match="cuda:7"):
        allocator_of(7)
    monkeypatch.undo()
