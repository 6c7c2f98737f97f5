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
import bench.prefill
import bench.steps
from bench.common import Budget, Target
from bench.decode_append import append_ways, appending
from bench.model_args import has_time, points, quantiles
from bench.partial import Partial
from bench.shapes import SHAPES, build_model, count_weights
from bench.steps import MODES, Slots, choose_modes, time_steps
from bench.waits import Watch
from tests.bench_tiny import TINY, load
from tests.models import one_thread
from tests.recorded_graph import RecordedGraph, flash2
from vattn.attention.append import index_put, writer
from vattn.engine import graphs
from vattn.hf.model import LoadedModel, load_model


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64))


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
    times = time_steps(cuda.step, "cuda", rounds=6, graphs=True, warmup=1)
    assert times.flow_us == 5000
    assert times.device_us == 2000
    flow = ["synchronize", "record", *["step", "record"] * 6, "synchronize"]
    assert cuda.log[1 : 1 + len(flow)] == flow
    assert cuda.log.count("sleep") == 3


def test_more_launches_than_the_queue_holds_have_no_time_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(bench.steps, "cuda", cuda)
    times = time_steps(cuda.step, "cuda", rounds=6, graphs=False, warmup=1)
    assert (times.flow_us, times.device_us) == (5000, None)
    assert "sleep" not in cuda.log


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
    with out.part("third"):
        raise TypeError("no such argument in this version")
    out.append("rows", {"x": 2})
    last = json.loads(path.read_text())
    assert last["results"]["failed"] == [
        {"part": "second", "why": "RuntimeError: no memory"},
        {"part": "third", "why": "TypeError: no such argument in this version"},
    ]
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
    assert quantiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p99": None, "mean": 2.0}
    assert quantiles(range(20))["p99"] == pytest.approx(18.81)
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


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.decode, "copy_bandwidth", lambda device: 1e9)


@pytest.mark.usefixtures("no_copies")
def test_decode_without_time_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decode.json"
    words = ["--points", "1x8", "--modes", "eager", "--budget-s", "0", "--json", str(path)]
    assert bench.decode.main(TINY + words) == 1
    assert "nothing was measured; cut: no time for steps eager 1x8" in capsys.readouterr().out
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


@pytest.mark.usefixtures("no_copies")
def test_decode_of_no_mode_that_there_is_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.decode.main([*TINY, "--points", "1x8", "--modes", "graphs"]) == 1
    assert "nothing was measured; graphs: a CPU has no CUDA graphs" in capsys.readouterr().out


@pytest.mark.usefixtures("no_copies")
def test_the_host_gap_needs_the_time_of_the_device(loaded: LoadedModel) -> None:
    steps = [
        {"mode": mode, "batch": 1, "context": 8, "flow_us": 9.0, "device_us": device_us}
        for mode, device_us in (("eager", None), ("graphs", 5.0))
    ]
    out = Partial(None, "decode", {}, lambda found: [])
    args = argparse.Namespace(shape="tiny-llama", device="cpu")
    decode = bench.decode.Decode(args, loaded, out, Budget(None))
    out.set(steps=steps)
    assert decode._step_of(MODES["eager"], (1, 8)) == 9.0  # there it is the same
    args.device = "cuda"
    assert decode._step_of(MODES["eager"], (1, 8)) is None
    assert decode._step_of(MODES["graphs"], (1, 8)) == 5.0


def test_prefill_without_time_fails(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "8", "--matrices", "32", "--rounds", "1", "--budget-s", "0"]
    assert bench.prefill.main(TINY + words) == 1
    assert "nothing was measured; cut: no time for eager 8" in capsys.readouterr().out


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
