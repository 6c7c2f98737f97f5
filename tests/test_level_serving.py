"""The serving level: arrivals, metrics, the open loop, and the level at its smallest; no times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.levels.serving.level as serving
from bench.__main__ import main, parse
from bench.common import Budget
from bench.levels.arrivals import mean_rate, poisson_arrivals, trace_arrivals
from bench.levels.block_sweep import AS_FAST, measured_side
from bench.levels.budget_share import Share
from bench.levels.engines import Side, parse_side
from bench.levels.open_loop import Window, serve_open_loop
from bench.levels.serving.metrics import (
    Served,
    metrics,
    most_at_once,
    parse_goodput,
    summary,
)
from bench.levels.serving.windows import Turns
from bench.paged import kernels
from bench.shapes import SHAPES, build_model
from bench.trace import read_moments
from tests.models import one_thread
from vattn.request import FinishReason, Request, Status
from vattn.sampling_params import SamplingParams


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


# Arrivals -----------------------------------------------------------------------------------------


def test_arrivals_are_the_same_for_a_seed_and_keep_their_rate() -> None:
    moments = poisson_arrivals(4000, 20.0, seed=3)
    assert np.array_equal(moments, poisson_arrivals(4000, 20.0, seed=3))
    assert not np.array_equal(moments, poisson_arrivals(4000, 20.0, seed=4))
    assert moments[-1] == pytest.approx(200)
    gaps = np.diff(moments, prepend=0.0)
    assert gaps.min() >= 0
    # Of a Poisson process, the gaps' deviation is their mean.
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    gaps = np.diff(poisson_arrivals(20000, 1.0, burstiness=burstiness))
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert poisson_arrivals(3, math.inf).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("requests", "rate", "burstiness", "name"),
    [(0, 1.0, 1.0, "requests=0"), (3, 0.0, 1.0, "rate_per_s=0"), (3, 1.0, -1.0, "burstiness=-1")],
)
def test_arrivals_that_cannot_be(requests: int, rate: float, burstiness: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        poisson_arrivals(requests, rate, burstiness=burstiness)


def test_a_trace_runs_so_many_times_as_fast() -> None:
    assert trace_arrivals([10.0, 12.0, 12.0, 20.0], 2.0).tolist() == [0, 1, 1, 5]
    assert mean_rate(np.array([10.0, 12.0, 14.0])) == 0.5
    with pytest.raises(ValueError, match="request 2 of the trace comes before"):
        trace_arrivals([1.0, 3.0, 2.0])
    with pytest.raises(ValueError, match=r"factor=0\.0"):
        trace_arrivals([1.0], 0.0)
    with pytest.raises(ValueError, match="no requests"):
        trace_arrivals([])
    with pytest.raises(ValueError, match="no rate"):
        mean_rate(np.array([1.0]))


def write_trace(path: Path, moments: list[str]) -> Path:
    rows = "".join(f"{moment},{40 + 8 * i},8\n" for i, moment in enumerate(moments))
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    return path


def test_moments_of_both_kinds_of_trace(tmp_path: Path) -> None:
    digits = ["2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.9305900"]
    assert read_moments(write_trace(tmp_path / "a.csv", digits)).tolist() == [0, 4.25]
    zoned = ["2024-05-10 23:59:59.500000+00:00", "2024-05-11 00:00:01+00:00"]
    assert read_moments(write_trace(tmp_path / "b.csv", zoned)).tolist() == [0, 1.5]
    with pytest.raises(ValueError, match="request 2 comes before"):
        read_moments(write_trace(tmp_path / "c.csv", digits[::-1]))
    with pytest.raises(ValueError, match="'x' of request 1 is not a date"):
        read_moments(write_trace(tmp_path / "d.csv", ["x"]))
    (tmp_path / "e.csv").write_text("ContextTokens\n1\n")
    with pytest.raises(ValueError, match=r"e\.csv has no column TIMESTAMP"):
        read_moments(tmp_path / "e.csv")


# Metrics ------------------------------------------------------------------------------------------


def served(arrival_s: float, *token_s: float, sent_s: float | None = None) -> Served:
    sent = arrival_s if sent_s is None else sent_s
    return Served(arrival_s, 10, sent, list(token_s), len(token_s))


def test_metrics_by_hand() -> None:
    # Sent late by 0.5 s: that is part of its latency.
    first = served(0.0, 1.0, 1.2, 1.6, sent_s=0.5)
    second = served(1.0, 3.0)
    failed = Served(2.0, 10, 2.0, error="no")
    row = metrics([first, second, failed], 4.0, {"ttft": 1500, "tpot": 400})
    assert (row["completed"], row["failed"]) == (2, 1)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (20, 4)
    assert row["request_throughput"] == 0.5
    assert row["output_throughput"] == 1.0
    assert row["total_token_throughput"] == 6.0
    assert row["request_goodput"] == 0.25  # the second came after 2 s
    assert row["mean_ttft_ms"] == row["median_ttft_ms"] == pytest.approx(1500)
    assert row["std_ttft_ms"] == pytest.approx(500)
    assert row["p90_ttft_ms"] == pytest.approx(1900)
    assert row["p99_ttft_ms"] is None
    # A single token has no time per further one.
    assert row["mean_tpot_ms"] == pytest.approx(300)
    assert row["mean_itl_ms"] == pytest.approx(300)
    assert row["p95_itl_ms"] == pytest.approx(200 + 0.95 * 200)
    assert row["mean_e2el_ms"] == pytest.approx(1800)
    assert row["schedule_slip_ms"] == {"median": 0, "max": pytest.approx(500), "late": 1}


def test_tokens_that_come_together_are_one_moment() -> None:
    both = served(0.0)
    both.came(1, 1.0)
    both.came(3, 2.0)
    assert both.output_tokens == 4
    assert both.tpot_s == pytest.approx(1 / 3)
    assert metrics([both], 2.0, {})["mean_itl_ms"] == pytest.approx(1000)


def test_p99_needs_twenty_and_nothing_needs_something() -> None:
    assert summary("ttft", range(19))["p99_ttft_ms"] is None
    assert summary("ttft", range(20))["p99_ttft_ms"] == pytest.approx(18.81)
    assert set(summary("itl", []).values()) == {None}
    row = metrics([Served(0.0, 1, error="no")], 1.0, {"ttft": 1})
    assert row["request_goodput"] == row["completed"] == 0
    assert row["schedule_slip_ms"] == {"median": None, "max": None, "late": 0}
    assert metrics([served(0.0, 1.0)], 1.0, {})["request_goodput"] is None
    with pytest.raises(ValueError, match=r"duration_s=0\.0"):
        metrics([], 0.0, {})


def test_most_at_once() -> None:
    # The third comes as the first ends.
    assert most_at_once([served(0.0, 2.0), served(1.0, 5.0), served(2.0, 3.0)]) == 2
    assert most_at_once([served(0.0, 2.0), served(1.0, 5.0), served(1.5, 3.0)]) == 3
    assert most_at_once([]) == 0


def test_limits_of_goodput() -> None:
    assert parse_goodput(["ttft:500", "tpot:12.5"]) == {"ttft": 500, "tpot": 12.5}
    for pairs, why in (
        (["ttft"], "'ttft' is not NAME:MS"),
        (["itl:5"], "'itl' is not one of ttft, tpot, e2el"),
        (["ttft:fast"], "'fast' is not a number of ms"),
        (["ttft:nan"], "'nan' is not a number of ms"),
        (["ttft:0"], "'0' is not a number of ms above 0"),
        (["ttft:5", "ttft:6"], "two limits of ttft"),
    ):
        with pytest.raises(ValueError, match=why):
            parse_goodput(pairs)


# Open loop ----------------------------------------------------------------------------------------


@dataclass
class SlowEngine:
    """Every step takes a second of its own clock and gives each request a token."""

    seconds: float = 0.0
    added_s: dict[str, float] = field(default_factory=dict)
    running: list[Request] = field(default_factory=list)
    slept_s: float = 0.0

    def clock(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert not self.running, "nobody sleeps while there is work"
        self.seconds += seconds
        self.slept_s += seconds

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        self.added_s[request.id] = self.seconds
        self.running.append(request)

    def step(self) -> list[Request]:
        self.seconds += 1.0
        news = list(self.running)
        for request in news:
            request.tokens.append(7)
            if len(request.tokens) == request.limit:
                request.status, request.finish_reason = Status.FINISHED, FinishReason.LENGTH
                self.running.remove(request)
        return news


def some_requests(count: int, new_tokens: int) -> list[Request]:
    return [
        Request(str(i), [1, 2, 3], SamplingParams(), limit=3 + new_tokens) for i in range(count)
    ]


def test_a_slow_engine_does_not_delay_arrivals() -> None:
    engine = SlowEngine()
    moments = np.array([0.0, 0.25, 0.5, 1.25])
    window = serve_open_loop(
        engine, some_requests(4, 3), moments, clock=engine.clock, sleep=engine.sleep
    )
    # None waited for an answer: those due during a step came right after it.
    assert engine.added_s == {"0": 0.0, "1": 1.0, "2": 1.0, "3": 2.0}
    assert [s.arrival_s for s in window.served] == moments.tolist()
    assert [s.slip_s for s in window.served] == [0.0, 0.75, 0.5, 0.75]
    # Latency counts from the moment that was meant.
    assert [s.ttft_s for s in window.served] == [1.0, 1.75, 1.5, 1.75]
    assert [s.tpot_s for s in window.served] == [1.0] * 4
    assert [s.e2el_s for s in window.served] == [3.0, 3.75, 3.5, 3.75]
    assert window.texts == [[7, 7, 7]] * 4
    assert window.seconds == 5.0


def test_an_idle_engine_is_not_stepped() -> None:
    engine = SlowEngine()
    window = serve_open_loop(
        engine, some_requests(2, 1), np.array([2.0, 4.0]), clock=engine.clock, sleep=engine.sleep
    )
    assert engine.slept_s == pytest.approx(3.0)
    assert [s.ttft_s for s in window.served] == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="2 requests and 1 moments"):
        serve_open_loop(engine, some_requests(2, 1), np.zeros(1))


def test_ratios_are_of_windows_at_the_same_arrivals() -> None:
    turns = Turns()
    for slower in (2.0, 4.0):
        fast = [served(0.0, 1.0, 2.0) for _ in range(20)]
        slow = [served(0.0, slower, 2 * slower) for _ in range(20)]
        turns.add("contiguous", Window(fast, [[1, 2]] * 20, 2.0))
        turns.add("paged", Window(slow, [[1, 2]] * 19 + [[1, 3]], 2 * slower))
    found = turns.ratios({"ttft": 2000})
    assert found["median_ttft_ms"]["repeats"] == [2, 4]
    assert not found["median_ttft_ms"]["agrees"]
    assert found["p99_e2el_ms"]["ratio"] == 3
    assert found["output_throughput"]["repeats"] == [2, 4]
    assert "request_goodput" not in found  # one of the windows has none
    assert turns.equal_texts() == (38, 40)
    row = turns.row("paged", {"ttft": 2000})
    assert (row["completed"], row["windows"], row["duration"]) == (40, 2, 12)


# The level ----------------------------------------------------------------------------------------


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "serving.json"
    words = ["serving", "--small", "--device", "cpu", "--json", str(path), *arguments]
    assert main(words) == 0
    text = path.read_text()
    assert str(tmp_path) not in text
    document: dict[str, Any] = json.loads(text)
    assert document["benchmark"] == "serving"
    results: dict[str, Any] = document["results"]
    return results


def test_the_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The conversations are shorter than larger blocks, which would share nothing.
    monkeypatch.setattr(kernels, "BLOCK_SIZES", (16, 32))
    results = run(tmp_path, "--plot", str(tmp_path / "serving.svg"))
    assert [load["load"] for load in results["loads"]] == ["random", "trace", "chat"]
    assert "absent" not in results
    assert {(row["load"], row["side"]) for row in results["rates"]} == {
        (load, side) for load in ("random", "trace", "chat") for side in ("contiguous", "paged")
    }
    for row in results["rates"]:
        assert (row["completed"], row["failed"]) == (8, 0)
        assert row["p99_ttft_ms"] is None
        assert row["median_ttft_ms"] > 0
    by = {(row["load"], row["side"]): row for row in results["rates"]}
    for load in ("random", "trace", "chat"):
        both = [by[load, side] for side in ("contiguous", "paged")]
        for key in ("request_rate", "total_input_tokens", "total_output_tokens"):
            assert both[0][key] == both[1][key], key
        # Windows before have had the same prompts, and nobody may profit from that.
        assert all((row["cached_tokens"] > 0) == (load == "chat") for row in both)
    for pair in results["pairs"]:
        assert pair["equal_texts"] == pair["compared_texts"] == 8
        assert pair["ratios"]["median_ttft_ms"]["ratio"] > 0
    tried = results["blocks"]  # the paged side has the size that was chosen, of all that it takes
    (chosen,) = [row for row in tried if row["chosen"]]
    assert chosen["step_us"] <= AS_FAST * min(row["step_us"] for row in tried)
    assert [row["block_tokens"] for row in tried] == [16, 32]
    assert results["sides"]["paged"]["block_tokens"] == chosen["block_tokens"]
    tables = serving.Serving().tables(results)
    assert len(tables) == 4
    assert all(table.markdown() for table in tables)
    assert (tmp_path / "serving.svg").read_text().startswith("<?xml")


def test_the_moments_and_limits_given(tmp_path: Path) -> None:
    moments = [f"2023-11-16 18:15:{second:02}.5" for second in (1, 2, 2, 7)]
    trace = write_trace(tmp_path / "conv.csv", moments)
    words = ["--trace", str(trace), "--num-prompts", "4", "--divisor", "4", "--loads", "trace"]
    results = run(tmp_path, *words, "--goodput", "ttft:1e6", "e2el:1e6")
    (load,) = results["loads"]
    assert load["goodput_limits_ms"] == {"ttft": 1e6, "e2el": 1e6}
    assert (load["num_prompts"], load["arrivals"]) == (4, "of the trace, time scaled")
    assert load["source"] == "conv.csv, lengths / 4"
    for row in results["rates"]:
        assert row["request_goodput"] == row["request_throughput"]


def test_a_side_that_cannot_be_had_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench.levels.engines as engines

    contiguous = engines.storage_of(engines.Side("contiguous"))

    def storage_of(side: engines.Side) -> Any:
        if side.kind == "paged":
            raise RuntimeError("no such kernel here")
        return contiguous

    monkeypatch.setattr(engines, "storage_of", storage_of)
    results = run(tmp_path, "--loads", "random")
    assert results["absent"] == {"paged": "RuntimeError: no such kernel here"}
    assert [row["side"] for row in results["rates"]] == ["contiguous"]
    assert "pairs" not in results


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--goodput", "itl:5"], "'itl' is not one of"),
        (["--goodput", "ttft:5", "ttft:6"], "two limits of ttft"),
        (["--paged", "contiguous"], "'contiguous' is no paged side"),
        (["--paged", "paged:none"], "'none' is not one of"),
        (["--load-factors", "0.5,0"], "is not numbers above 0"),
        (["--prompt-tokens", "9,3"], "is not the least and the most"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--loads", "batch"], "'batch' is not one of"),
    ],
)
def test_arguments_that_cannot_be(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serving", "--device", "cpu", *words])
    assert why in capsys.readouterr().err


def test_a_size_that_is_given_is_not_measured(tmp_path: Path) -> None:
    results = run(tmp_path, "--loads", "random", "--paged", "paged:sdpa-gather:16")
    assert "blocks" not in results
    assert results["sides"]["paged"]["block_tokens"] == 16


def test_sides_that_need_no_sweep_and_one_that_has_no_room() -> None:
    room = {"positions": 12, "sequences": 4}
    for side in (Side("contiguous"), Side("paged", "fa2", 512)):
        assert measured_side(side, None, "tiny-llama", **room) == (side, [])
    model = build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64)
    found, tried = measured_side(Side("paged", None, 16), model, "tiny-llama", **room)
    assert (found, tried) == (Side("paged", "sdpa-gather", 16), [])
    with pytest.raises(ValueError, match=r"12 tokens have no room for the .* of a sweep"):
        measured_side(Side("paged"), model, "tiny-llama", **room)


def test_the_contiguous_side_is_of_the_same_library() -> None:
    level = serving.Serving()

    def chosen(device: str, *words: str) -> str:
        args = parse(level, ["--device", "cpu", *words])
        args.device = device
        side = parse_side(args.paged)
        return serving.same_library(args, replace(side, kernel=side.kernel or "fa3"))

    assert chosen("cuda") == "contiguous:flash_attn_3"
    assert chosen("cuda", "--paged", "paged:fa2:512") == "contiguous:flash_attn_2"
    assert chosen("cuda", "--contiguous", "contiguous:torch") == "contiguous:torch"
    assert chosen("cpu") == "contiguous"


def test_the_last_load_has_its_share_of_the_time() -> None:
    spent = [0.5, 1.5, 1.5, 2.5]
    budget = type("Fixed", (Budget,), {"spent_s": property(lambda self: spent.pop(0))})(3.0)
    assert Share(budget, 0, 3).allows("random at 0.5")
    assert not Share(budget, 0, 3).allows("random at 0.8")
    assert Share(budget, 1, 3).allows("trace at 0.5")
    assert Share(budget, 2, 3).allows("chat at 0.5")
    assert budget.cut == ["random at 0.8"]
    assert Share(Budget(None), 0, 3).allows("anything")


def test_a_load_that_is_begun_has_a_window_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def allows(self: Share, what: str) -> bool:
        asked.append(what)
        return False

    monkeypatch.setattr(Share, "allows", allows)
    words = ["--loads", "random,chat", "--load-factors", "0.5,0.8", "--repeats", "2"]
    results = run(tmp_path, *words)
    measured = {(row["load"], row["load_factor"]) for row in results["rates"]}
    assert measured == {("random", 0.5), ("chat", 0.5)}
    assert all(row["windows"] == 1 for row in results["rates"])
    left = ["at 0.5, window 1", "at 0.8"]
    assert asked == [f"{load} {what}" for load in ("random", "chat") for what in left]
