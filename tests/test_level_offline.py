"""The offline level at its smallest: both sides do the same; counts are asserted, times are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bench.__main__ import main
from bench.levels import registry
from bench.levels.block_sweep import AS_FAST, block_rows
from bench.levels.engines import (
    SAME_LIBRARY,
    EngineSettings,
    Side,
    contiguous_for,
    has_graphs,
    how_it_ran,
    kv_budget,
    open_engine,
    open_sides,
    parse_side,
)
from bench.levels.offline.work import (
    LONG_REQUESTS,
    draw_long_trace,
    fixed_works,
    open_work_trace,
    prefix_works,
    sharpen,
)
from bench.levels.turns import Contender, attention_share, decode_turns, equal_texts, serve_rounds
from bench.paged.kernels import kinds
from bench.shapes import SHAPES, build_model
from bench.trace import read_trace
from tests.test_bench import KEYS
from vattn.attention.select import BACKENDS

Row = dict[str, Any]
SMALL = ["offline", "--small", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(one_thread: None) -> Any:
    shape = SHAPES["tiny-llama"]
    return sharpen(build_model(shape, "cpu", torch.float32, 512))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Row:
    path = tmp_path_factory.mktemp("offline") / "offline.json"
    assert main([*SMALL, "--json", str(path), "--kernels", "sdpa-gather,fa2"]) == 0
    found: Row = json.loads(path.read_text())
    assert set(found) == KEYS
    return found


def run(path: Path, *arguments: str) -> Row:
    assert main([*SMALL, "--json", str(path), *arguments]) == 0
    found: Row = json.loads(path.read_text())
    return found


def settings(tokens: int, sequences: int, model: Any) -> EngineSettings:
    return EngineSettings(tokens, sequences, kv_budget(model, 4 * tokens * sequences))


# The level ----------------------------------------------------------------------------------------


def test_both_sides_generate_the_same(document: Row) -> None:
    results = document["results"]
    rows = results["contexts"] + results["rounds"]
    assert [row["workload"] for row in results["rounds"]] == ["trace", "prefix", "long"]
    contexts = [(r["workload"], r["batch"], r["context"]) for r in results["contexts"]]
    assert contexts == [("heavy", 1, 16), ("contexts", 2, 32), ("contexts", 2, 96)]
    for row in rows:
        assert row["equal_texts"] == row["compared_texts"] > 0, row
        assert row["contiguous"]["ran"]["attention"] == "sdpa"
        assert row["contiguous"]["ran"]["block_tokens"] is None
        assert row["paged"]["ran"]["block_tokens"] == row["block_tokens"]
        assert row["contiguous"]["ran"]["steps"] == row["paged"]["ran"]["steps"]
        assert len(row["ratio"]["repeats"]) == document["settings"]["repeats"]
        for side in (row["contiguous"], row["paged"]):
            assert side["ran"]["preemptions"] == 0
            assert side["ran"]["graphs"]["captured"] == 0


def test_prefixes_are_shared_on_both_sides(document: Row) -> None:
    rows = {row["workload"]: row for row in document["results"]["rounds"]}
    hits = {
        name: [rows[name][side]["ran"]["prefix_cache_hits"] for side in ("contiguous", "paged")]
        for name in rows
    }
    assert min(hits["prefix"]) > 0
    # Prompts of a round are new: nobody finds those of another, but for a first token by chance.
    assert max(hits["trace"] + hits["long"]) < 4


def test_throughput_has_the_names_of_vllm(document: Row) -> None:
    for row in document["results"]["rounds"]:
        for side in (row["contiguous"], row["paged"]):
            assert side["completed"] == row["requests"]
            per_s = side["total_output_tokens"] / side["duration"]
            assert side["output_throughput"] == pytest.approx(per_s)
            assert side["requests_per_minute"] == pytest.approx(60 * side["request_throughput"])


def test_of_sizes_that_are_as_fast_the_smallest_is_taken() -> None:
    seconds = {16: 1.2, 32: 1.015, 64: 1.01, 128: 1.0, 256: 1.1}
    best, rows = block_rows("fa2", "tiny-llama", 4, 64, seconds)
    assert best == 32
    assert [row["block_tokens"] for row in rows if row["chosen"]] == [32]
    assert [row["step_us"] for row in rows] == [each * 1e6 for each in seconds.values()]


def test_the_block_is_the_fastest_of_those_tried(document: Row) -> None:
    results = document["results"]
    blocks = results["blocks"]
    (chosen,) = [row for row in blocks if row["chosen"]]
    assert chosen["step_us"] <= AS_FAST * min(row["step_us"] for row in blocks)
    assert [row["block_tokens"] for row in blocks] == [16, 32]
    assert {row["block_tokens"] for row in results["contexts"]} == {chosen["block_tokens"]}


def test_kernels_that_are_not_there_are_absent(document: Row) -> None:
    results = document["results"]
    assert set(results["absent"]) == {"fa2"}
    assert results["absent"]["fa2"]
    assert {row["kernel"] for row in results["contexts"]} == {"sdpa-gather"}


def test_shares_of_a_step(document: Row) -> None:
    short, long = document["results"]["contexts"][1:]
    assert 0 < short["kv_share"] < long["kv_share"] < 1
    assert 0 < short["contiguous"]["attention_share"] < 1
    assert 0 < short["paged"]["attention_share"] < 1


def test_results_can_be_rendered(document: Row) -> None:
    level = registry.load("offline")
    tables = level.tables(document["results"])
    assert [len(table.rows) for table in tables][:2] == [3, 3]
    assert "long: drawn like vAttention's offline trace" in tables[1].markdown()
    assert level.draw(Figure(), document["results"])
    assert level.tables({}) == []
    assert not level.draw(Figure(), {})


def test_the_target_is_the_worst_point_of_long_contexts() -> None:
    def point(context: int, ratio: float, workload: str = "contexts") -> Row:
        row = {"batch": 2, "context": context, "kernel": "k", "ratio": {"ratio": ratio}}
        return row | {"workload": workload}

    level = registry.load("offline")
    asked = {"device": "cpu", "workloads": ["contexts"]}
    rows = [point(128, 0.9), point(512, 1.5), point(1024, 1.4), point(512, 1.1, "heavy")]
    (target,) = level.targets(asked, {"contexts": rows})
    assert (target.measured, target.limit, target.met) == (1.4, 1.3, True)
    assert target.note == "the least, at 2 x 1024, k; 1.10x where weights dominate"
    assert level.targets(asked, {})[0].met is None
    assert level.targets(asked | {"device": "cuda"}, {"contexts": rows}) == []


def test_the_papers_preset(tmp_path: Path) -> None:
    found = run(tmp_path / "o.json", "--preset", "paper-offline", "--blocks", "16")
    results = found["results"]
    (row,) = results["rounds"]
    assert row["workload"] == "long"
    assert {"1.18x", "1.97x"} <= {published["figure"] for published in results["published"]}
    assert "contexts" not in results
    assert row["block_tokens"] == 16


def test_lengths_from_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n64000,1024\n128000,2048\n")
    words = ["--workloads", "long", "--long-trace", str(path), "--blocks", "16"]
    (row,) = run(tmp_path / "o.json", *words)["results"]["rounds"]
    assert (row["prompt_mean"], row["answer_mean"]) == ((125 + 250) / 2, 3)
    assert row["source"] == "trace.csv, lengths / 512"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="ContextTokens and GeneratedTokens, or num_prefill"):
        read_trace(path)


def test_no_time(tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    assert main([*SMALL, "--json", str(path), "--budget-s", "0", "--blocks", "16"]) == 1
    results = json.loads(path.read_text())["results"]
    assert "contexts" not in results
    assert "long, sdpa-gather" in results["cut_for_time"]


# Work ---------------------------------------------------------------------------------------------


def test_long_prompts_are_like_the_papers() -> None:
    trace = draw_long_trace()
    assert len(trace) == LONG_REQUESTS == 427
    assert trace.context.min() >= 64_000
    assert trace.context.max() <= 193_000
    assert 80_000 < trace.context.mean() < 92_000
    assert 300 < np.median(trace.generated) < 380
    assert open_work_trace(None, long=True, requests=3, divisor=1).context.tolist() == (
        trace.context[:3].tolist()
    )
    scaled = open_work_trace(None, long=False, requests=3, divisor=8)
    assert scaled.source.endswith("lengths / 8")


def test_shared_prefixes_differ_between_rounds() -> None:
    first, second = prefix_works(3, 16, 4, 2, 256, 2)
    shared = {tuple(prompt[:16]) for prompt in first.prompts}
    assert len(shared) == 1
    assert len({tuple(prompt) for prompt in first.prompts}) == 3
    assert shared != {tuple(prompt[:16]) for prompt in second.prompts}
    assert first.totals == [22, 22, 22]


# Turns --------------------------------------------------------------------------------------------


def test_rounds_and_what_is_looked_at(model: Any) -> None:
    seen: list[str] = []
    works = fixed_works(2, 12, 5, 256, 3)
    with open_sides(["contiguous", "contiguous:sdpa"], model, settings(32, 2, model)) as engines:
        both = [Contender(name, llm) for name, llm in engines.items()]
        rounds = serve_rounds(both, works, 2, lambda c: seen.append(c.name))
    assert (rounds.equal, rounds.compared) == (6, 6)
    assert {name: len(s) for name, s in rounds.seconds.items()} == dict.fromkeys(engines, 2)
    assert seen.count("contiguous") == seen.count("contiguous:sdpa") >= 6
    assert len(rounds.ratio("contiguous", "contiguous:sdpa").repeats) == 2


def test_decode_turns_need_tokens_to_the_end(model: Any) -> None:
    with open_sides(["contiguous"], model, settings(64, 2, model)) as engines:
        one = [Contender(name, llm) for name, llm in engines.items()]
        decoded = decode_turns(one, fixed_works(2, 12, 10, 256, 2), turns=3, warmup=1, steps=2)
        assert [len(turns) for turns in decoded.seconds["contiguous"]] == [3, 3]
        with pytest.raises(AssertionError, match="ended before the last turn"):
            decode_turns(one, fixed_works(2, 12, 9, 256, 1), turns=3, warmup=1, steps=2)
        share = attention_share(one[0], fixed_works(2, 12, 10, 256, 3)[2], 4)
        assert share is not None
        assert "forward" not in vars(one[0].llm.engine.runner._backend)


def test_texts_are_compared_by_request() -> None:
    assert equal_texts([[[1, 2], [3]], [[1, 2], [4]]]) == 1
    assert equal_texts([[[1], [2]], [[1], [2]], [[1], [5]]]) == 1


# Engines ------------------------------------------------------------------------------------------


def test_names_of_sides() -> None:
    for name in ("contiguous", "contiguous:sdpa", "paged", "paged:fa2", "paged:fa2:256"):
        assert str(parse_side(name)) == name
    assert parse_side("paged::32") == Side("paged", None, 32)
    assert contiguous_for(parse_side("paged:fa2:256")) == Side("contiguous", "flash_attn_2")
    assert contiguous_for(parse_side("paged:flashinfer")) == contiguous_for(Side("paged"))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("blocks", "must begin with contiguous or paged"),
        ("paged:sdpa", "'sdpa' is not one of sdpa-gather"),
        ("contiguous:fa2", "'fa2' is not one of flash_attn_3"),
        ("contiguous:sdpa:16", "only a paged side has a block size"),
        ("paged:fa2:0", "a positive number"),
        ("paged:fa2:big", "a positive number"),
    ],
)
def test_unknown_sides_are_refused(name: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_side(name)


def test_every_kernel_has_a_partner() -> None:
    assert set(SAME_LIBRARY) == set(kinds())
    assert {name for name in SAME_LIBRARY.values() if name is not None} <= set(BACKENDS)


def test_an_engine_of_each_kind(model: Any) -> None:
    with open_sides(["contiguous", "paged:sdpa-gather:16"], model, settings(64, 2, model)) as both:
        assert not any(has_graphs(llm) for llm in both.values())
        ran = {name: how_it_ran(llm) for name, llm in both.items()}
    assert ran["paged:sdpa-gather:16"]["block_tokens"] == 16
    budgets = [how["budget_bytes"] for how in ran.values()]
    assert budgets[0] >= budgets[1] > 0
    with pytest.raises(ValueError, match="closed"):
        both["contiguous"].stats()


def test_a_side_that_cannot_serve_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="flash_attn_2"):
        open_engine("contiguous:flash_attn_2", model, settings(64, 2, model))
