"""The benchmarks of whole models that serve requests or compile, at their smallest: never times."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.batching_config
import bench.compile
import bench.mapping
import bench.workload
from bench.batching_config import FLASH, has_setting
from bench.common import Budget
from bench.offline_sides import BatchSettings, Work
from bench.partial import Partial
from bench.served import serve_closed, uniform_work
from bench.shapes import SHAPES, build_model
from bench.steps import Slots
from bench.transformers_side import compared, open_transformers, settings_for
from bench.workload import Workload
from tests.bench_tiny import TINY, load
from tests.models import one_thread
from vattn import LLM
from vattn.hf.compiled import compile_model
from vattn.hf.model import LoadedModel, load_model


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64))


def test_workload(tmp_path: Path) -> None:
    path = tmp_path / "workload.json"
    words = ["--nano-shape", "tiny-qwen3", "--requests", "5", "--lengths", "3,6"]
    words += ["--concurrency", "1,2", "--sequences", "4", "--versus-s", "5", "--json", str(path)]
    assert bench.workload.main(TINY + words) == 0
    found = load(path, "workload")
    work = uniform_work(5, [3, 6], 256, seed=0)
    assert found["nano"]["requests_ended"] == 5
    assert found["nano"]["generated_tokens"] == work.generated
    assert found["nano"]["prompt_tokens"] == sum(map(len, work.prompts))
    assert found["nano"]["ttft_ms"]["p50"] > 0
    assert found["nano"]["ttft_ms"]["p99"] is None  # of five
    assert [(r["concurrency"], r["requests_ended"]) for r in found["served"]] == [(2, 8), (1, 8)]
    versus = found["versus"]
    assert versus["requests"] == 5
    assert versus["attention_of_transformers"] in ("sdpa", "paged|sdpa")
    theirs_s, ours_s = versus["transformers_seconds"], versus["vattn_seconds"]
    assert versus["rounds"] == len(theirs_s) == len(ours_s) == len(versus["generated_tokens"]) == 3
    ratios = sorted(a / b for a, b in zip(theirs_s, ours_s, strict=True))
    assert versus["ratio"] == pytest.approx(ratios[1])


def test_transformers_sizes_its_cache_when_no_engine_holds_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []

    class Open:
        def close(self) -> None:
            closed.append("vattn")

    def opened(*args: Any, **kwargs: Any) -> Any:
        assert closed == ["vattn"]
        raise KeyError("seen")

    monkeypatch.setattr(bench.workload, "open_transformers", opened)
    args = argparse.Namespace(
        device="cpu", sequences=2, requests=2, nano_shape="tiny-qwen3", lengths=[3, 6]
    )
    workload = Workload(args, Partial(None, "workload", {}, lambda found: []), Budget(None))
    workload._llm = Open()  # type: ignore[assignment]
    with pytest.raises(KeyError, match="seen"):
        workload.versus()


def test_rounds_that_only_one_side_has_done_do_not_count() -> None:
    works = [uniform_work(2, [3, 5], 256, seed) for seed in range(3)]
    found = compared(works, [4.0, 6.0, 100.0], [1.0, 2.0])
    assert (found["rounds"], found["requests"]) == (2, 2)
    assert found["ratio"] == pytest.approx(3.5)
    rates = [work.generated / s for work, s in zip(works, [4.0, 6.0], strict=False)]
    assert found["transformers_tokens_per_s"] == pytest.approx(sum(rates) / 2)


def test_workload_refuses_lengths_that_are_no_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.workload.main([*TINY, "--lengths", "9,3"])
    assert "shortest and the longest" in capsys.readouterr().err


class Broken:
    """Settings with which nothing can be made."""

    def prepare(self, model: Any) -> None:
        pass

    def config(self, work: Work) -> Any:
        raise OSError("no such kernel here")


def test_transformers_runs_with_the_first_settings_that_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argparse.Namespace(nano_shape="tiny-qwen3", device="cpu", dtype="float32")
    work = uniform_work(2, [3, 5], 256, seed=0)
    side, attention = open_transformers(
        args, [Broken(), BatchSettings(16, 64, 2)], largest=work, warm_up=work
    )
    side.close()
    assert attention in ("sdpa", "paged|sdpa")  # by its version
    assert "no such kernel here" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel here"):
        open_transformers(args, [Broken()], largest=work, warm_up=work)


def test_transformers_chooses_for_itself_on_a_gpu() -> None:
    flash, plain = settings_for("cuda", 8)
    work = uniform_work(1, [3, 5], 256, seed=0)
    model = build_model(SHAPES["tiny-qwen3"], "cpu", torch.float32, 16)
    attention = model.config._attn_implementation
    for settings, switches in ((flash, True), (plain, False)):
        settings.prepare(model)
        config: Any = settings.config(work)
        if has_setting(FLASH):
            assert config.auto_switch_to_flash is switches
            assert model.config._attn_implementation == attention
        elif not switches:
            assert model.config._attn_implementation == "paged|sdpa"


def test_settings_of_transformers_go_by_the_names_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Config:  # of 5.17
        block_size: int = 256
        num_blocks: int | None = None
        max_batch_tokens: int | None = None
        max_requests_per_batch: int | None = None

    monkeypatch.setattr(bench.batching_config, "ContinuousBatchingConfig", Config)
    work = uniform_work(1, [3, 5], 256, seed=0)
    config: Any = BatchSettings(16, 64, 2).config(work)
    assert (config.block_size, config.max_batch_tokens, config.num_blocks) == (16, 64, 2)
    chosen: list[str] = []
    model = argparse.Namespace(set_attn_implementation=chosen.append)
    for settings in settings_for("cuda", 8):
        settings.prepare(model)
        assert vars(settings.config(work)) == vars(Config())
    assert chosen == ["paged|sdpa"]  # of the one without FlashAttention


def test_closed_loop_stops_in_time_and_leaves_nothing() -> None:
    model = build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64)
    with LLM(model, skip_tokenizer_init=True, max_num_seqs=3, kv_cache_memory_bytes="4MiB") as llm:
        work = uniform_work(8, [5, 9], 256, seed=3)
        whole = serve_closed(llm.engine, work, 3, None)
        assert len(whole.timings) == whole.begun == 8
        assert whole.generated_tokens == work.generated
        none = serve_closed(llm.engine, work, 2, -1.0)
        assert (none.begun, none.generated_tokens, none.timings) == (0, 0, [])
        assert not llm.engine.has_unfinished
        with pytest.raises(AssertionError, match="no place for 4"):
            serve_closed(llm.engine, work, 4, None)
        llm.engine.check()


def test_mapping(tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    words = ["--running", "3", "--queued", "2", "--step-tokens", "64", "--kv-budget", "4MiB"]
    words += ["--steps", "20", "--turn", "10", "--divisor", "32", "--json", str(path)]
    assert bench.mapping.main(TINY + words) == 0
    found = load(path, "mapping")
    assert found["steady"] is True
    assert found["budget_used"] >= 0.95
    assert list(found["ways"]) == ["ahead", "sync"]
    for way in found["ways"].values():
        assert way["steps"] == 20
        assert 0 < way["ensure_share"] <= way["waiting_share"] < 1
        assert way["calls_per_step"]["map"] >= 0
    assert found["trace"]["requests"] == 4000


def test_mapping_without_a_steady_state_has_no_figure() -> None:
    args = argparse.Namespace(shape="llama3-8b", device="cuda")
    ways = {"ahead": {"waiting_share": 0.004}, "sync": {"waiting_share": 0.03}}
    found = {"ways": ways, "steady": True, "replaced": 128, "budget_used": 0.96}
    (target,) = bench.mapping.make_targets(args, found)
    assert (target.measured, target.met, target.note) == (0.004, True, "sync 3.00%")
    (target,) = bench.mapping.make_targets(args, found | {"steady": False, "budget_used": 0.5})
    assert (target.measured, target.met) == (None, None)
    assert "128 requests ended, 50% of the KV cache's budget" in target.note


def test_mapping_does_not_warm_up_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    words = ["--running", "2", "--queued", "1", "--step-tokens", "64", "--kv-budget", "4MiB"]
    words += ["--steps", "2", "--ways", "ahead", "--divisor", "64", "--warm-up-s", "0"]
    assert bench.mapping.main([*TINY, *words, "--json", str(path)]) == 0
    found = load(path, "mapping")
    assert (found["steady"], found["replaced"]) == (False, 0)


@pytest.mark.parametrize("budget_s", ["0", "600"])
def test_compile_writes_points_as_they_come(
    budget_s: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compile.json"
    seen: list[list[str]] = []

    def compare(slots: Slots, compiled: Any, graphs: bool, pairs: int) -> dict[str, Any]:
        seen.append(sorted(json.loads(path.read_text())["results"]))
        numbers = dict.fromkeys(("base_us", "candidate_us", "ratio_low", "ratio_high"), 1.0)
        point = {"sequences": len(slots.slots), "context": slots.tokens, "launch": "kernels"}
        return point | numbers | {"ratio": 1.0, "difference": 0.0}

    monkeypatch.setattr(bench.compile, "compile_model", not_compiled)
    monkeypatch.setattr(bench.compile, "compare", compare)
    words = ["--points", "1x8,2x8", "--budget-s", budget_s, "--json", str(path)]
    assert bench.compile.main(TINY + words) == 0
    found = load(path, "compile")
    points_of = [(row["sequences"], row["context"]) for row in found["steps"]]
    assert found["compile"]["graphs"] == 2
    # The first is measured in any case: compiling has taken the time already.
    assert points_of == ([(1, 8)] if budget_s == "0" else [(1, 8), (2, 8)])
    assert found["cut_for_time"] == (["2x8"] if budget_s == "0" else [])
    assert seen == [["compile"], ["compile", "steps"]][: len(points_of)]


def not_compiled(loaded: LoadedModel, *, tune: bool) -> Any:
    """What stands for a compiled model where none is called."""
    return argparse.Namespace(refusal=None)


def test_compile_measures_the_same_steps_of_both(loaded: LoadedModel) -> None:
    compiled = compile_model(loaded, backend="eager")
    with Slots(loaded, 2, 8) as slots:
        row = bench.compile.compare(slots, compiled, graphs=False, pairs=2)
        assert row["difference"] < 1e-5
        assert (row["sequences"], row["context"], row["launch"]) == (2, 8, "kernels")
        compiled.refusal = "changed too often"
        with pytest.raises(RuntimeError, match="changed too often"):
            bench.compile.compare(slots, compiled, graphs=False, pairs=2)


def test_a_model_that_does_not_compile_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compile.json"
    refused = argparse.Namespace(refusal="no compiler")
    monkeypatch.setattr(bench.compile, "compile_model", lambda loaded, tune: refused)
    assert bench.compile.main([*TINY, "--points", "1x8", "--json", str(path)]) == 1
    (failed,) = json.loads(path.read_text())["results"]["failed"]
    assert failed["why"] == "RuntimeError: the model does not compile: no compiler"
