"""The benchmarks of whole models at their smallest: counts, keys and sums, never times."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.decode
import bench.decode_append
import bench.mapping
import bench.prefill
import bench.steps
import bench.workload
from bench.common import Budget, Target
from bench.decode_append import append_ways, appending
from bench.model_args import has_time, points, quantiles
from bench.offline_sides import BatchSettings, Work
from bench.partial import Partial
from bench.served import serve_closed, uniform_work
from bench.shapes import SHAPES, build_model, count_weights
from bench.steps import MODES, Slots, choose_modes, time_steps
from bench.transformers_side import open_transformers, settings_for
from bench.waits import Watch
from tests.models import one_thread
from tests.recorded_graph import RecordedGraph, flash2
from vattn import LLM
from vattn.attention.append import index_put, writer
from vattn.engine import graphs
from vattn.hf.model import LoadedModel, load_model

TINY = ["--device", "cpu", "--shape", "tiny-llama"]


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64))


def load(path: Path, benchmark: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["benchmark"] == benchmark
    assert {"time", "versions", "commit", "machine", "command"} < set(document)
    assert document["settings"]["model"]["layers"] == 2
    assert "failed" not in document["results"]
    results: dict[str, Any] = document["results"]
    return results


# Shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "read"),
    [
        # Llama-3-8B has 8,030,261,248 parameters, its table 128256 x 4096 of them.
        ("llama3-8b", 8_030_261_248, 8_030_261_248 - 128256 * 4096),
        ("qwen3-0.6b", 596_049_920, 596_049_920),  # the table is the head
    ],
)
def test_the_real_shapes_have_their_parameters(name: str, total: int, read: int) -> None:
    weights = count_weights(build_model(SHAPES[name], "meta", torch.bfloat16, 64))
    assert weights.total == total
    assert weights.read_bytes == 2 * read
    tied = SHAPES[name].tied
    assert weights.layers + weights.head + (0 if tied else weights.embedding) == total


def test_bytes_and_operations_of_a_shape() -> None:
    shape = SHAPES["llama3-8b"]
    assert shape.kv_token_bytes(torch.bfloat16) == 128 << 10
    # One new token sees itself and those before; scores and sums are a product and a sum each.
    assert shape.attention_flops(1, before=9) == 10 * 4 * 32 * 32 * 128
    assert shape.attention_flops(8) == sum(shape.attention_flops(1, before=i) for i in range(8))


def test_weights_are_the_same_for_a_seed() -> None:
    shape = SHAPES["tiny-qwen3"]
    one, two, other = (build_model(shape, "cpu", torch.float32, 32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight


# Steps --------------------------------------------------------------------------------------------


def test_slots_are_full_of_finite_values(loaded: LoadedModel) -> None:
    with Slots(loaded, 3, 20) as slots:
        assert list(slots.slots) == sorted(slots.slots)
        for slot in slots.slots:
            for k in slots.cache.view(int(slot), 1):
                assert k.shape == (20, 2, 16)
                assert bool(k.isfinite().all())
                assert float(k.std()) > 0.5
        decode, prefill = slots.decode(), slots.prefill()
    assert decode.decodes_only
    assert decode.kv_lens.tolist() == [20, 20, 20]
    assert prefill.num_decodes == 0
    assert len(prefill.input_ids) == 60
    assert prefill.logit_rows.tolist() == [19, 39, 59]


def test_a_mode_with_graphs_runs_graphs(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "graph_maker", lambda device: RecordedGraph)
    with Slots(loaded, 3, 20, flash2(loaded.specs)) as slots:
        step = slots.decode()
        runner = slots.runner(MODES["graphs"], None)
        eager = slots.runner(MODES["eager"], None)
        torch.testing.assert_close(runner.run(step).clone(), eager.run(step))
        assert runner.graph_stats.replayed == 1
        assert eager.graph_stats.eager == 1


def test_a_backend_without_graphs_is_not_timed_as_if_it_had_them(loaded: LoadedModel) -> None:
    with Slots(loaded, 1, 8, "sdpa") as slots, pytest.raises(ValueError, match="captured"):
        slots.runner(MODES["graphs"], None)


def test_a_cpu_has_no_graphs() -> None:
    modes, refused = choose_modes(["eager", "graphs", "compiled"], "cpu")
    assert [mode.name for mode in modes] == ["eager", "compiled"]
    assert list(refused) == ["graphs"]
    assert not choose_modes(["graphs"], "cuda")[1]


class FakeCuda:
    """A device on which a step takes 2 ms, and 5 ms if it waits for its launches."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")

    def step(self) -> None:
        self.now_ms += 2.0 if self.log and "sleep" in self.log[-2:] else 5.0
        self.log.append("step")

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.now_ms
        self.cuda.log.append("record")

    def synchronize(self) -> None:
        self.cuda.log.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_a_flow_is_not_interrupted_and_a_head_start_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(bench.steps, "cuda", cuda)
    times = time_steps(cuda.step, "cuda", rounds=6, warmup=1)
    assert times.flow_us == 5000
    assert times.device_us == 2000
    flow = ["synchronize", "record", *["step", "record"] * 6, "synchronize"]
    assert cuda.log[1 : 1 + len(flow)] == flow
    assert cuda.log.count("sleep") == 3


# Appending ----------------------------------------------------------------------------------------


def test_ways_to_append_are_taken_and_given_back(loaded: LoadedModel) -> None:
    assert append_ways(loaded, None) == ["index_put"]
    before = writer
    with appending("index_put", loaded, None) as backend, Slots(loaded, 1, 8, backend) as slots:
        import vattn.attention.append as module

        assert module.writer("cuda") is index_put
        slots.runner(MODES["eager"], None).run(slots.decode())
    assert module.writer is before


def test_a_kernel_that_appends_is_told_to_or_not(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench.decode_append, "choose", lambda *_, **__: flash2(loaded.specs, appends=True)
    )
    assert append_ways(loaded, None) == ["kernel", "index_put"]
    logits = {}
    for way in append_ways(loaded, None):
        with appending(way, loaded, None) as backend, Slots(loaded, 2, 8, backend) as slots:
            assert backend.append_mode == way
            logits[way] = slots.runner(MODES["eager"], None).run(slots.decode())
    torch.testing.assert_close(logits["kernel"], logits["index_put"])


# Results ------------------------------------------------------------------------------------------


def test_results_are_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "some" / "file.json"

    def targets(found: dict[str, Any]) -> list[Target]:
        return [Target("rows", len(found.get("rows", ())), 2, "", at_least=True)]

    out = Partial(path, "some", {"a": 1}, targets)
    out.append("rows", {"x": 1})
    first = json.loads(path.read_text())
    assert first["results"] == {"rows": [{"x": 1}]}
    assert first["targets"][0]["met"] is False
    with out.part("second"):
        raise RuntimeError("no memory")
    out.append("rows", {"x": 2})
    last = json.loads(path.read_text())
    assert last["results"]["failed"] == [{"part": "second", "why": "RuntimeError: no memory"}]
    assert last["targets"][0]["met"] is True
    assert out.end() == 1
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_what_cannot_be_cut_short_is_not_begun_late() -> None:
    budget = Budget(50.0)
    assert has_time(budget, "short")
    assert not has_time(budget, "compiling", 60.0)
    assert has_time(Budget(None), "anything", 1e9)
    assert budget.cut == ["compiling"]


def test_points_and_quantiles() -> None:
    assert points("1x1K,64x2K") == [(1, 1024), (64, 2048)]
    for text in ("1", "1x2x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="two numbers such as 64x2K"):
            points(text)
    with pytest.raises(argparse.ArgumentTypeError):
        points("0x1")
    assert quantiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p99": pytest.approx(2.98), "mean": 2.0}
    assert quantiles([])["p50"] is None


def test_only_outer_calls_are_summed() -> None:
    class Thing:
        def outer(self, n: int) -> int:
            return self.inner() + n

        def inner(self) -> int:
            return 1

    thing, watch = Thing(), Watch()
    watch.add(thing, "outer")
    watch.add(thing, "inner")
    assert thing.outer(2) == 3
    outer_s, by_name = watch.take()
    assert outer_s == by_name["outer"] > by_name["inner"] > 0
    thing.inner()
    outer_s, by_name = watch.take()
    assert outer_s == by_name["inner"] > 0 == by_name["outer"]


# The commands -------------------------------------------------------------------------------------


def test_decode(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    words = ["--points", "1x8,3x16", "--modes", "eager,graphs", "--rounds", "3"]
    words += ["--engine-steps", "4", "--json", str(path)]
    assert bench.decode.main(TINY + words) == 0
    found = load(path, "decode")
    assert list(found["refused_modes"]) == ["graphs"]
    assert found["cut_for_time"] == []
    cells = [("eager", 1, 8), ("eager", 3, 16)]
    for kind in ("steps", "engine", "append"):
        assert [(r["mode"], r["batch"], r["context"]) for r in found[kind]] == cells
    token_bytes = SHAPES["tiny-llama"].kv_token_bytes(torch.float32)
    for row in found["steps"]:
        assert row["kv_bytes"] == row["batch"] * row["context"] * token_bytes
        read = row["weight_bytes"] + row["kv_bytes"]
        assert row["floor_us"] == pytest.approx(read / found["copy_bandwidth_bytes_per_s"] * 1e6)
        assert row["ratio"] == pytest.approx(row["flow_us"] / row["floor_us"])
    for row in found["engine"]:
        assert row["context_mean"] > row["context"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_us"] * 1e6)
        assert row["graphs"]["captured"] == 0


def test_decode_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    words = ["--points", "1x8", "--modes", "eager", "--budget-s", "0", "--json", str(path)]
    assert bench.decode.main(TINY + words) == 0
    found = load(path, "decode")
    assert found["cut_for_time"] == ["steps eager 1x8", "engine eager 1x8", "append eager 1x8"]
    assert "steps" not in found


def test_targets_of_the_points_that_are_asked_for() -> None:
    args = argparse.Namespace(shape="llama3-8b", device="cuda", points=[(1, 1024), (64, 2048)])
    rows = [
        {"mode": mode, "batch": batch, "context": context, "ratio": ratio}
        for mode, batch, context, ratio in [
            ("eager", 1, 1024, 4.0),
            ("graphs", 1, 1024, 1.3),
            ("graphs", 64, 2048, 1.4),
            ("graphs+compiled", 64, 2048, 1.6),
        ]
    ]
    one, many = bench.decode.make_targets(args, {"steps": rows})
    assert (one.measured, one.met) == (None, None)  # the mode that it is of was not measured
    assert (many.measured, many.met) == (1.4, True)
    assert many.note == "graphs, graphs+compiled 1.60"
    args.device = "cpu"
    assert bench.decode.make_targets(args, {"steps": rows}) == []


def test_prefill(tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    words = ["--tokens", "24", "--matrices", "32,64", "--rounds", "2", "--json", str(path)]
    assert bench.prefill.main(TINY + words) == 0
    found = load(path, "prefill")
    assert set(found["matrix_flops_per_s"]) == {"32", "64"}
    (row,) = found["prefill"]
    weights = count_weights(build_model(SHAPES["tiny-llama"], "meta", torch.float32, 24))
    assert row["layer_flops"] == 2 * weights.layers * 24
    assert row["head_flops"] == 2 * 256 * 64
    assert row["attention_flops"] == 2 * 4 * 16 * 4 * (24 * 25 // 2)
    best = max(found["matrix_flops_per_s"].values())
    assert row["share"] == pytest.approx(row["flops"] / row["flow_us"] * 1e6 / best)


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
    assert found["nano"]["ttft_ms"]["p99"] >= found["nano"]["ttft_ms"]["p50"] > 0
    assert [(r["concurrency"], r["requests_ended"]) for r in found["served"]] == [(2, 4), (1, 2)]
    versus = found["versus"]
    assert versus["requests"] == 5
    assert versus["attention_of_transformers"] == "sdpa"
    assert versus["ratio"] == pytest.approx(
        versus["transformers_seconds"] / versus["vattn_seconds"]
    )


def test_workload_refuses_lengths_that_are_no_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.workload.main([*TINY, "--lengths", "9,3"])
    assert "shortest and the longest" in capsys.readouterr().err


class Broken:
    """Settings with which nothing can be made."""

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
    assert attention == "sdpa"
    assert "no such kernel here" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such kernel here"):
        open_transformers(args, [Broken()], largest=work, warm_up=work)


def test_transformers_chooses_for_itself_on_a_gpu() -> None:
    flash, plain = settings_for("cuda", 8)
    work = uniform_work(1, [3, 5], 256, seed=0)
    assert flash.config(work).auto_switch_to_flash
    assert not plain.config(work).auto_switch_to_flash


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
