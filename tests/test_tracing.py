"""Event traces: the file, and what is in it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vattn
from tests.engine_cases import fresh_model, greedy, make_llm
from tests.fake_cuda.fake import OUT_OF_MEMORY, FakeCuda
from tests.helpers import make_pool
from tests.stub_model import VOCABULARY, StubModel, StubRunner
from tests.trace_files import PREFIX, TraceFile, holds, serve
from vattn import _core
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.engine.trace import EngineTrace

pytest_plugins = ("tests.cache_fixtures", "tests.trace_fixtures")

STEP_PARTS = ("schedule", "grow", "forward", "sample", "remember", "stage", "take", "wait")


# What is in it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_every_step_and_its_parts(tmp_path: Path, is_async: bool) -> None:
    llm = make_llm(async_scheduling=is_async)
    serve(llm)
    before = llm.stats()
    with llm.trace(tmp_path / "t.json"):
        serve(llm)
    stats, trace = llm.stats(), TraceFile(tmp_path / "t.json")
    llm.close()
    steps = trace.of("step")
    assert len(steps) == stats.num_steps - before.num_steps
    first = before.num_steps + 1
    numbers = [s["args"]["step"] for s in steps]
    assert numbers == list(range(first, first + len(steps)))
    turns = steps + trace.of("idle")  # at the end of an asynchronous run
    for part in STEP_PARTS:
        found = trace.of(part)
        assert found, part
        assert all(any(holds(turn, slice_) for turn in turns) for slice_ in found), part
    forwards = trace.of("forward")
    assert [f["args"]["step"] for f in forwards] == numbers
    assert all(holds(s, f) for s, f in zip(steps, forwards, strict=True))
    # Whose tokens are taken: of this step, or of the one before.
    taken = {t["args"]["step"]: t for t in trace.of("take")}
    assert set(taken) <= set(numbers)
    for number, step in zip(numbers, steps, strict=True):
        assert number not in taken or holds(step, taken[number]) != is_async
    tokens = sum(s["args"]["tokens"] for s in steps)
    parts = ("decodes", "chunk_tokens", "drafts")
    assert tokens == sum(s["args"][part] for s in steps for part in parts)
    assert steps[-1]["args"]["running"] == 4
    assert steps[-1]["args"]["kv_tokens"] > 4 * len(PREFIX)
    assert len(trace.of("tokens", "s")) == len(taken)
    assert set(trace.names("thread_name").values()) >= {"engine"}


def test_what_became_of_requests(tmp_path: Path, llm: vattn.LLM) -> None:
    serve(llm, 1)
    before = llm.stats()
    with llm.trace(tmp_path / "t.json"):
        outputs = serve(llm, 5)
    stats, trace = llm.stats(), TraceFile(tmp_path / "t.json")
    hits = sum(e["args"]["tokens"] for e in trace.of("prefix hit", "i"))
    assert hits == stats.prefix_cache_hits - before.prefix_cache_hits > 0
    assert len(trace.of("admit", "i")) == 5
    assert [e["args"]["reason"] for e in trace.of("finish", "i")] == ["length"] * 5
    for output in outputs:
        (life,) = trace.of(f"request {output.request_id}", "b")
        assert life["args"]["prompt_tokens"] == len(output.prompt_token_ids)
        assert life["args"]["cached_tokens"] == output.num_cached_tokens
        assert life["args"]["output_tokens"] == 6
        names = [e["name"] for e in trace.entries if e["ph"] == "b" and e["id"] == life["id"]]
        assert names == [life["name"], "queued", "prefill", "decode"]
    running = [e["args"]["running"] for e in trace.of("requests", "C")]
    assert max(running) == 5
    assert running[-1] == 0
    live = [e["args"]["live"] for e in trace.of("memory (bytes)", "C")]
    assert max(live) > 0


@pytest.mark.parametrize("swap_gib", [0.0, 0.001])
def test_who_gives_way(tmp_path: Path, swap_gib: float) -> None:
    pool = make_pool(_core.host_driver(strict=True), pages=40)
    config = EngineConfig(
        max_num_seqs=8, order="token", swap_space=swap_gib, enable_prefix_caching=False
    )
    model: Any = StubModel(max_positions=512)
    engine = Engine(model, config, pool=pool)
    engine.runner = StubRunner(engine.cache)  # type: ignore[assignment]
    trace = EngineTrace(engine, tmp_path / "t.json")
    for seed in range(6):
        ids = [(seed * 131 + i * i + 7 * i) % VOCABULARY for i in range(60)]
        (request,) = engine.make_requests(str(seed), ids, greedy(120))
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
    trace.stop()
    found = TraceFile(tmp_path / "t.json")
    stats = engine.stats()
    engine.close()
    counts = Counter(e["name"] for e in found.entries if e["ph"] == "i")
    assert counts["preempt"] + counts["swap out"] == stats.num_preemptions > 0
    assert counts["swap out"] == stats.requests_swapped_out
    assert counts["swap in"] == stats.requests_swapped_in
    assert (counts["swap in"] > 0) == (swap_gib > 0)


@pytest.mark.usefixtures("small_pages")
def test_every_call_of_the_driver(driver: _core.Driver, driver_kind: str, tmp_path: Path) -> None:
    """As many as the driver counts, of each kind, and those of the mapper on a track of its own."""
    if driver_kind == "cuda":
        pytest.skip("the model is on the host; see make gpu-check")
    pool = make_pool(driver)
    llm = vattn.LLM(
        fresh_model("llama"), dtype="float32", device="cpu", skip_tokenizer_init=True, pool=pool,
        max_model_len=256, max_num_seqs=8,
    )  # fmt: skip
    pool.mapper.drain()
    before = pool.driver_calls()
    with llm.trace(tmp_path / "t.json"):
        serve(llm, 8, 30)
        other = vattn.KVCache(2, 2, 16, torch.float32, max_seqs=2, max_tokens=256, pool=pool)
        slot = other.open()
        other.prepare(np.array([slot], np.int32), np.array([200], np.int32)).wait()
        other.close()
        pool.mapper.drain()
        after = pool.driver_calls()
    trace = TraceFile(tmp_path / "t.json")
    llm.close()
    delta = {op: after[op] - before[op] for op in after}
    assert {op: trace.calls()[op] for op in delta} == delta
    assert min(delta[op] for op in ("create", "map", "release")) > 0, delta
    assert trace.other["driver"] == driver.name()
    assert trace.other["dropped_calls"] == 0
    maps = [e for e in trace.of("map") if e["args"]["calls"]]
    assert all(e["args"]["bytes"] == e["args"]["pages"] * pool.page_bytes > 0 for e in maps)
    threads = trace.names("thread_name")
    assert {threads[e["pid"], e["tid"]] for e in maps} >= {"vattn-mapper"}
    own = {e["tid"] for e in trace.of("step")}
    assert own == {threading.get_native_id()}


def test_calls_that_fail(fake_cuda: FakeCuda, fake_driver: _core.Driver) -> None:
    """A run of pages that is undone half-way tells both, and the counts still agree."""
    page = fake_driver.granularity()
    base, pages = fake_driver.reserve(4 * page, page), fake_driver.create(4, page)
    before = fake_driver.counters()
    fake_driver.start_trace(10)
    fake_cuda.fail("cuMemMap", nth=3, code=OUT_OF_MEMORY)
    earliest = time.perf_counter_ns()
    with pytest.raises(_core.OutOfPages):
        fake_driver.map(base, pages, page)
    latest = time.perf_counter_ns()
    rows, dropped = fake_driver.stop_trace()
    after = list(fake_driver.counters())
    calls = {after[op]: (n, size, failed) for op, _, _, size, _, n, _, failed in rows.tolist()}
    assert calls == {"map": (3, 4 * page, 1), "unmap": (1, 0, 0)}
    assert dropped == 0
    assert fake_driver.counters()["map"][0] - before["map"][0] == 3
    # The clock is that of Python's perf_counter.
    assert (rows[:, 1] >= earliest).all()
    assert (rows[:, 2] <= latest).all()
    fake_driver.destroy(pages, page)
    fake_driver.release(base, 4 * page)


def test_no_room_for_more(tmp_path: Path, llm: vattn.LLM, caplog: pytest.LogCaptureFixture) -> None:
    llm.start_trace(tmp_path / "t.json", max_events=20)
    serve(llm)
    summary = llm.stop_trace()
    trace = TraceFile(tmp_path / "t.json")
    assert trace.other["dropped_events"] == summary.dropped_events > 0
    assert trace.other["dropped_calls"] == summary.dropped_calls > 0
    assert len([e for e in trace.entries if e.get("cat") == "driver"]) == 20
    (told,) = [e for e in trace.entries if e.get("s") == "g"]
    assert str(summary.dropped_events + summary.dropped_calls) in told["name"]
    assert "raise max_events" in caplog.text
    assert trace.of("finish", "i")  # the last ones are there


def test_kernels_are_on_the_same_axis(tmp_path: Path, llm: vattn.LLM) -> None:
    before = llm.stats().num_steps
    with llm.trace(tmp_path / "t.json", kernels=True):
        serve(llm)
    steps, trace = llm.stats().num_steps - before, TraceFile(tmp_path / "t.json")
    layers = len(llm.engine.cache.specs)
    attention, forwards = trace.of("vattn::attention"), trace.of("forward")
    assert len(forwards) == steps
    assert len(attention) == steps * layers
    for number, forward in enumerate(forwards):
        of_step = attention[number * layers : (number + 1) * layers]
        assert all(holds(forward, call) for call in of_step)
    operators = [e for e in trace.entries if e.get("cat") == "cpu_op"]
    assert operators
    assert {e["pid"] for e in operators}.isdisjoint({e["pid"] for e in trace.of("step")})
    assert "torch operators" in trace.names("process_name").values()
    assert not trace.of("vattn::clock")


def test_compressed(tmp_path: Path, llm: vattn.LLM) -> None:
    with llm.trace(tmp_path / "t.json.gz"):
        serve(llm)
    assert TraceFile(tmp_path / "t.json.gz").of("step")
