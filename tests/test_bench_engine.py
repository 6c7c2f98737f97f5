"""The engine's benchmarks at their smallest. Counts are asserted, times are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.overlap
import bench.prefix
from bench.fake import Left, fake_gpu, open_fake_driver
from bench.offline_sides import PAD, BatchSettings, Padded, make_llama, make_work
from bench.trace import Trace, draw_trace, open_trace, read_trace
from tests.test_bench import load
from vattn import PagePool


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(benchmark: Any, path: Path, *arguments: str) -> dict[str, Any]:
    """A benchmark's document, from its smallest run."""
    assert benchmark.main(["--small", "--json", str(path), *arguments]) == 0
    document = load(path, benchmark.__name__.split(".")[-1])
    assert str(path.parent) not in json.dumps(document)  # results name no folders
    return document


# Traces -------------------------------------------------------------------------------------------


def test_a_trace_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,28\nx,300,20\nx,7,1\n")
    trace = open_trace(path)
    assert (trace.context.tolist(), trace.generated.tolist()) == ([100, 300, 7], [28, 20, 1])
    assert trace.total.tolist() == [128, 320, 8]
    assert trace.first(2).total.tolist() == [128, 320]
    assert trace.part(1, 2).total.tolist() == [320, 8]
    scaled = trace.scaled(8)
    assert (scaled.context.tolist(), scaled.generated.tolist()) == ([12, 37, 1], [3, 2, 1])
    assert trace.as_json()["source"] == "trace.csv"
    with pytest.raises(ValueError, match="3 requests, and 4 are asked for"):
        trace.first(4)
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        Trace(np.array([1, 2]), np.array([1]), "x")


def test_a_drawn_trace_is_the_same_every_time() -> None:
    assert np.array_equal(draw_trace(50).total, draw_trace(50).total)
    assert not np.array_equal(draw_trace(50, seed=1).total, draw_trace(50).total)
    assert len(open_trace(None)) == 4000


def test_columns_may_be_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("GeneratedTokens,ContextTokens\n1,2\n")
    trace = read_trace(path)
    assert (trace.context[0], trace.generated[0]) == (2, 1)


# The fake GPU -------------------------------------------------------------------------------------


def test_what_is_left_on_the_fake_is_found() -> None:
    pool: PagePool | None = None
    with pytest.raises(Left, match="left or broken"), fake_gpu():
        pool = PagePool("cuda", driver=open_fake_driver(), budget_bytes=1 << 30)
    del pool


# Overlap ------------------------------------------------------------------------------------------


def test_overlap(tmp_path: Path) -> None:
    ways = run(bench.overlap, tmp_path / "overlap.json")["results"]["ways"]
    by = {(way["phase"], way["way"]): way for way in ways}
    assert set(by) == {
        (phase, way)
        for phase in ("steady", "growing")
        for way in ("ahead", "sync", "sync fresh", "free")
    }
    for phase in ("steady", "growing"):
        ended = {by[phase, way]["requests_ended"] for way in ("ahead", "sync", "free")}
        assert min(ended) > 0
        assert all(way["steps"] > 0 and way["preemptions"] == 0 for way in ways)
    # Pages are created while there are few of them, and not once the budget is in use.
    assert by["growing", "sync"]["calls_per_step"]["create"] > 0
    assert by["steady", "sync"]["calls_per_step"]["create"] == 0
    # Which step a background thread's call falls into depends on the clock; that it maps does not.
    assert all(by["steady", way]["calls_per_step"]["map"] > 0 for way in ("ahead", "free"))
    # Pages that stay mapped are not mapped again.
    stale, fresh = by["steady", "sync"], by["steady", "sync fresh"]
    assert stale["calls_per_step"]["map"] < fresh["calls_per_step"]["map"]


# Throughput ---------------------------------------------------------------------------------------


def test_padding_changes_no_text() -> None:
    model = make_llama(2, 64, 32, 256, 64)
    work = make_work([5, 12, 3, 9, 7], [4, 1, 6, 2, 5], 256, 0)
    assert all(PAD not in prompt for prompt in work.prompts)
    alone = Padded(model, 1, "single").run(work)
    assert [len(text) for text in alone] == work.new_tokens
    assert Padded(model, 3, "padded").run(work) == alone
    assert Padded(model, 3, "padded sorted", by_length=True).run(work) == alone


def test_room_for_the_requests_that_run_at_once() -> None:
    work = make_work([10, 30, 20], [10, 10, 10], 256, 0)
    config = BatchSettings(page_tokens=16, step_tokens=64, sequences=2).config(work)
    assert config.num_blocks == (40 // 16 + 2) + (30 // 16 + 2)
    assert (config.max_batch_tokens, config.max_requests_per_batch) == (64, 2)


# Prefix -------------------------------------------------------------------------------------------


def test_prefix(tmp_path: Path) -> None:
    found = run(bench.prefix, tmp_path / "prefix.json")["results"]
    assert len(found["prefixes"]) == 2
    for row in found["prefixes"]:
        assert row["token_equal"]
        assert row["first_cached_tokens"] == 0
        assert row["second_cached_tokens"] == 96
