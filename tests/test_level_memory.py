"""The memory level: its small run, and its counts against what they have to be by hand."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.__main__ import main
from bench.common import Json
from bench.fake import PUBLISHED_US, fake_gpu, open_fake_driver
from bench.levels.fold import fold, grouped, unfold
from bench.levels.memory import batch as memory_batch
from bench.levels.memory import paged as memory_paged
from bench.levels.memory import rate as memory_rate
from bench.levels.memory import steps as memory_steps
from bench.levels.memory.calls import modelled_us, serve
from bench.levels.memory.cells import Cell, compute, measure, waste_row
from bench.levels.memory.level import Memory
from bench.levels.memory.shapes import (
    ALL,
    PUBLISHED_MOST,
    PUBLISHED_PAGES,
    SHAPES,
    KVShape,
    Regions,
    implied,
    shorter,
    stretched,
)
from bench.levels.plot import write_plot
from bench.trace import Trace, draw_trace
from vattn import _core

MIB = 1 << 20
PAGE = 2 * MIB
LLAMA = SHAPES["llama3-8b"]
APART = Regions("token", 1, PAGE, apart=True)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return draw_trace(64).scaled(8)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Json:
    path = tmp_path_factory.mktemp("level") / "memory.json"
    plot = path.with_suffix(".svg")
    words = ["--small", "--device", "cpu", "--json", str(path), "--plot", str(plot)]
    assert main(["memory", *words]) == 0
    assert "most requests at once" in plot.read_text()
    found: Json = json.loads(path.read_text())
    assert str(path.parent) not in path.read_text()
    return found


# The small run ------------------------------------------------------------------------------------


def test_every_part_is_measured(document: Json) -> None:
    results = document["results"]
    assert "failed" not in results
    assert {"waste", "batch", "calls", "rate", "prefill", "tables"} <= set(results)
    assert set(results["absent"]) == {"latency of the driver's calls"}
    assert results["trace"]["left_out"] == 0
    assert results["costs_us"] == dict(PUBLISHED_US)
    assert document["targets"] == []  # of small settings there are none
    waste = unfold(results["waste"])
    assert all(0 < row["live_share"] <= 1 for row in waste)
    assert [row["driver"] for row in waste if row.get("default")] == ["cuda", "host"]
    assert {row["layout"] for row in waste} >= {"blocks", "preallocated", "head order"}
    assert {row["how"] for row in unfold(results["batch"])} == {"measured", "computed"}


def test_results_alone_make_tables_targets_and_plot(document: Json, tmp_path: Path) -> None:
    level, results = Memory(), json.loads(json.dumps(document["results"]))
    tables = {table.title.split(":")[0]: table for table in level.tables(results)}
    assert len(tables) == 6
    assert len(tables["waste"].rows) == len(unfold(results["waste"]))
    assert all(table.markdown() for table in tables.values())
    assert write_plot(level, results, tmp_path / "a.svg")
    assert not write_plot(level, {"rate": results["rate"]}, tmp_path / "b.svg")
    shares = [target.measured for target in level.targets(document["settings"], results)]
    assert len(shares) == 2
    for row in results["waste"]:
        if row.get("default"):
            row["live_share"] = 0.94
    assert [target.met for target in level.targets(document["settings"], results)] == [False, False]
    assert level.targets(document["settings"], {}) == []


def test_presets_say_what_was_published(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    words = ["--preset", "paper-fragmentation", "--small", "--device", "cpu", "--parts", "batch"]
    assert main(["memory", *words, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [figure["figure"] for figure in results["published"]] == [
        "187 -> 240 (1.28x)",
        "203 -> 258 (1.27x)",
        "56 -> 68 (1.21x)",
    ]
    rows = Memory().tables(results)[0].rows
    published = {(row[1], row[2]): row[5] for row in rows if row[5] is not None}
    layout = "K and V apart, 1 layer, no cover"
    assert published == {(layout, "64K"): 68, (layout, "2M"): 56}
    assert results["budgets"][0]["budget_bytes"] == implied(SHAPES["yi-34b-tp2"])[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "waste,fun"], "fun: there is no such thing; use waste, batch"),
        (["--shapes", "gpt-9"], "gpt-9: there is no such thing; use yi-6b"),
        (["--divisor", "0"], "0: give a whole number, 1 or more"),
        (["--layers-per-region", "1,x"], "1,x: give numbers of layers, 0 for all"),
        (["--kv-budget", "much"], "much"),
        (["--bandwidth", "fast"], "fast: give a number above 0, such as 2.04e12"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "--small", *words])
    assert message in capsys.readouterr().err


def test_lengths_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"--max-model-len 1: every request of .* is longer"):
        main(["memory", "--small", "--max-model-len", "1"])
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="no columns ContextTokens"):
        main(["memory", "--small", "--trace", str(bad)])
    implied_of = ["--shapes", "qwen3-8b", "--kv-budget", "implied", "--parts", "batch"]
    assert main(["memory", "--small", "--device", "cpu", *implied_of]) == 1
    assert "no figures were published for qwen3-8b; use it with yi-6b" in capsys.readouterr().out


# Contiguous ---------------------------------------------------------------------------------------


def test_calls_of_a_cache_that_fills(trace: Trace) -> None:
    part = trace.first(16)
    found = {}
    for layers in (1, 8):
        cell = Cell("cuda", Regions("token", layers, PAGE))
        with fake_gpu() as fake:
            bytes_, calls = measure(cell, LLAMA, LLAMA.layers, part, open_fake_driver())
            gc.collect()
            api = fake.calls()
        pages = (bytes_.live_bytes + bytes_.cover_bytes) // PAGE
        # A page is mapped by one call each, whatever the layout; access is set once a range.
        assert api["cuMemMap"] == api["cuMemCreate"] == pages
        assert api["cuMemUnmap"] <= pages
        assert calls["admission"]["set_access"] == len(part) * LLAMA.layers // layers
        assert calls["end"]["create"] == 0
        assert bytes_.token_bytes == int(part.total.sum()) * LLAMA.token_bytes
        found[layers] = bytes_.live_share
    assert found[8] > found[1]  # more layers in a page, less is lost at the end


def test_a_host_cell_has_one_region_and_stands_for_all(trace: Trace) -> None:
    part = trace.first(4)
    cell = Cell("host", Regions("head", ALL, 16 << 10), default=True)
    row = waste_row(cell, LLAMA, part, "cpu", host_bytes=64 * MIB)
    assert (row["measured_layers"], row["cover_share"]) == (1, 0.0)
    whole = compute(cell, LLAMA, part)
    assert row["tail_bytes_per_request"] == round(whole.tail_bytes / len(part))
    assert row["live_share"] == round(whole.live_share, 4)
    computed = waste_row(cell, LLAMA, part, "cpu", host_bytes=1)
    assert computed["measured_layers"] == 0
    assert "map_per_admission" not in computed
    assert computed["tail_bytes_per_request"] == row["tail_bytes_per_request"]
    assert _core.host_driver().physical_bytes() == 0


def test_pages_that_no_gpu_has_are_computed(trace: Trace) -> None:
    """None of these asks for a GPU, and there may be none."""
    small = Regions("token", 1, 64 << 10)
    on_fake = waste_row(Cell("cuda", small), LLAMA, trace.first(8), "cpu", 0)
    on_gpu = waste_row(Cell("cuda", small), LLAMA, trace.first(8), "cuda", 0)
    assert (on_fake["measured_layers"], on_gpu["measured_layers"]) == (32, 0)
    assert on_fake["live_share"] == on_gpu["live_share"]
    budget = (trace, 1 << 30, 4096, 4)
    fake = memory_batch.most_in_regions(LLAMA, small, *budget, "cpu")
    real = memory_batch.most_in_regions(LLAMA, small, *budget, "cuda")
    assert (fake.pop("how"), real.pop("how")) == ("measured", "computed")
    assert fake == real


def test_the_published_layout() -> None:
    """Pages of K alone: 2048 tokens of Yi-6B in 2 MiB and 64 in 64 KiB, and no cover."""
    yi = SHAPES["yi-6b"]
    layout = APART.layout(yi, 4096, "cuda")
    assert [region.token_bytes for region in layout.regions] == [PAGE // 2048] * 64
    assert layout.token_bytes == yi.token_bytes == 64 << 10
    assert layout.tiles == (1,)
    assert SHAPES["yi-34b-tp2"].kv_heads == 4


@pytest.mark.parametrize("name", PUBLISHED_MOST)
def test_implied_conditions_give_the_published_figures(name: str) -> None:
    """Half a page is lost in each of the regions."""
    shape = SHAPES[name]
    budget, mean = implied(shape)
    found = tuple(
        round(budget / (mean * shape.token_bytes + shape.layers * page)) for page in PUBLISHED_PAGES
    )
    assert found == PUBLISHED_MOST[name]


def test_lengths_are_stretched_and_cut() -> None:
    given = Trace(np.array([10, 30, 60]), np.array([10, 10, 0]), "x")
    found = stretched(given, 80)
    assert found.total.tolist() == [40, 80, 121]  # nobody generates nothing
    assert shorter(found, 80).total.tolist() == [40, 80]


# Most requests ------------------------------------------------------------------------------------


def test_requests_until_the_budget_is_full(trace: Trace) -> None:
    budget = 1 << 30
    regions = Regions("token", 8, PAGE)
    row = memory_batch.most_in_regions(LLAMA, regions, trace, budget, 4096, 8, "cpu")
    counts = [_by_hand(np.roll(trace.total, -start)) for start in range(0, 64, 8)]
    assert (row["first"], row["low"], row["high"]) == (counts[0], min(counts), max(counts))
    assert row["requests"] == round(float(np.median(counts)))


def _by_hand(lengths: Any) -> int:
    """Four regions of eight layers, pages of 64 tokens, reads in tiles of up to 224 tokens."""
    left, admitted = (1 << 30) // PAGE, 0
    for tokens in lengths.tolist():
        covered = max(-(-tokens // tile) * tile for tile in (128, 176, 192, 224))
        left -= 4 * -(-covered // 64)
        if left < 0:
            break
        admitted += 1
    return admitted


def test_blocks_until_the_budget_is_full(trace: Trace) -> None:
    row = memory_paged.most_in_blocks(LLAMA, 16, trace, 1 << 30, 4096, 4)
    blocks = np.cumsum(-(-trace.total // 16))
    # 2 MiB a block, one of which is for padding.
    assert row["first"] == int((blocks <= 511).sum())
    assert row["how"] == "measured"
    assert row["low"] <= row["requests"] <= row["high"]
    whole = memory_batch.most_whole_slots(LLAMA, 1 << 30, 4096)
    assert (whole["requests"], whole["how"]) == (2, "computed")


def test_waste_of_blocks(trace: Trace) -> None:
    part = trace.first(8)
    row = memory_paged.waste_row(LLAMA, 16, part, 4096)
    held = int((-(-part.total // 16) * 16).sum())
    tokens = int(part.total.sum())
    assert row["live_share"] == round(tokens / held, 4)
    assert row["tail_bytes_per_request"] == round((held - tokens) * LLAMA.token_bytes / 8)
    assert row["table_bytes"] == 8 * (4096 // 16) * 4


# Calls --------------------------------------------------------------------------------------------


def test_stale_reuse_saves_calls(trace: Trace) -> None:
    rows = serve(LLAMA, Regions("token", 8, PAGE), trace, running=8, steps=60, device="cpu")
    by = {(row["reuse_stale"], row["phase"]): row for row in rows}
    assert len(by) == 4
    for row in rows:
        if row["phase"] == "cold":
            assert row["admissions"] == 8
            assert row["create_per_admission"] == row["map_per_admission"] > 0
            assert row["map_per_1000_tokens"] == 0
    fresh, stale = by[False, "steady"], by[True, "steady"]
    assert fresh["admissions"] == stale["admissions"] > 8
    assert fresh["set_access_per_admission"] == 4  # regions
    assert stale["set_access_per_admission"] < 4
    assert stale["map_per_admission"] < fresh["map_per_admission"]
    assert stale["modelled_us_per_admission"] < fresh["modelled_us_per_admission"]


def test_modelled_time() -> None:
    calls = {"create": 1.0, "map": 2.0, "set_access": 3.0, "unmap": 4.0, "destroy": 5.0}
    assert modelled_us(calls) == 100 + 2 * 2 + 3 * 38 + 4 * 34


# Rate ---------------------------------------------------------------------------------------------


def test_need_for_new_memory() -> None:
    """Eight sequences of 100 tokens: 2048 more are two pages of 1024 in each of 32 regions."""
    given = Trace(np.full(8, 100), np.ones(8, np.int64), "x")
    regions = Regions("token", 1, 4 * MIB)
    row = memory_rate.decode_row(LLAMA, regions, given, 8, 2048, 2e12)
    per_step = 8 * 32 * 2 / 2048
    assert (row["step_ms"], row["step_from"]) == (6.5, "vLLM CI, H200")
    assert row["mapped_mb_per_s"] == pytest.approx(per_step * 4 * MIB / 6.5e-3 / 1e6, rel=1e-3)
    assert row["largest_step_ms"] == pytest.approx(8 * 32 * 40e-3)
    assert row["driver_ms_per_s"] == pytest.approx(per_step * 40e-3 / 6.5e-3, rel=1e-2)
    assert row["driver_ms_per_s_create"] == pytest.approx(3.5 * row["driver_ms_per_s"], rel=1e-2)
    alone = memory_rate.decode_row(LLAMA, regions, given, 1, 10, 2e12)
    assert alone["step_from"] == "bytes / bandwidth"
    assert alone["step_ms"] == round((LLAMA.weight_bytes + 100 * LLAMA.token_bytes) / 2e9, 2)
    assert alone["mapped_mb_per_s"] == 0


def test_a_prompt_at_full_rate() -> None:
    two = memory_rate.prefill_row(SHAPES["llama3-8b-tp2"], 312e12)
    one = memory_rate.prefill_row(LLAMA, 312e12)
    assert two["tokens_per_s"] == pytest.approx(2 * one["tokens_per_s"], abs=1)
    assert one["mb_per_s"] == pytest.approx(312e12 / (2 * 8.03e9) * (128 << 10) / 1e6, abs=0.1)


# Block tables -------------------------------------------------------------------------------------


def test_what_a_step_changes_in_the_tables() -> None:
    sizes = {"sequences": 4, "context": 256, "block_tokens": 16, "pairs": 3, "repeats": 2}
    row = memory_steps.step_row(LLAMA, Regions("token", 8, PAGE), **sizes, device="cpu")
    before = memory_steps.first_lengths(4, 256)
    steps = 3 * 2 + memory_steps.WARMUP
    taken = int((-(-(before + steps) // 16) - -(-before // 16)).sum())
    assert row["entries_per_step"] == round(taken / steps, 3)
    assert row["sent_bytes_per_step"] == round(12 * taken / steps, 1)  # an entry and its place
    assert row["repeats_low"] <= row["ratio"] <= row["repeats_high"]
    assert row["ratio"] > 0


def test_both_sides_have_the_same_lengths() -> None:
    lengths = memory_steps.first_lengths(3, 4096)
    seen: list[list[int]] = []
    step = memory_steps.Steps(lengths, lambda now: seen.append(now.tolist()))
    step()
    step()
    assert seen == [(lengths + 1).tolist(), (lengths + 2).tolist()]
    assert 2048 < lengths.min() <= lengths.max() <= 4096


# Folding ------------------------------------------------------------------------------------------


def test_folded_rows_come_back() -> None:
    rows = [{"a": 1, "b": i, "c": None if i else 0.5} for i in range(3)]
    assert fold(rows) == {"a": 1, "b": [0, 1, 2], "c": [0.5, None, None]}
    assert unfold([fold(rows), {"a": 2}]) == [*rows, {"a": 2}]
    others = [{"a": 2, "b": 7, "c": 0}, {"a": 1, "b": 8}]
    assert grouped([*rows, *others], "a") == [fold(rows), fold(others[:1]), fold(others[1:])]
    with pytest.raises(ValueError, match="need the same keys"):
        fold([{"a": 1}, {"b": 1}])
    with pytest.raises(ValueError, match="must have no lists"):
        fold([{"a": [1]}])


def test_shapes_of_a_gpu() -> None:
    """Heads and weights are split over the GPUs of a model."""
    shape = KVShape("x", 2, 8, 64, 1e6, gpus=2)
    assert (shape.kv_heads, shape.token_bytes, shape.weight_bytes) == (4, 2 * 2 * 4 * 64 * 2, 10**6)
    assert sum(s.token_bytes for s in shape.specs(apart=True)) == shape.token_bytes
