"""bench.allocator_gpu without a GPU: its programs at their smallest, its ratios and its models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.allocator_gpu
from bench.alloc_traces.builder import TraceBuilder
from bench.allocator_gpu import Bench, make_targets, step_ratio, with_ratio
from bench.allocator_gpu_child import WAYS, run
from bench.allocator_gpu_models import find_or_build, modelled
from bench.allocator_gpu_programs import PAIR_BYTES, SIZES
from bench.allocator_native import Replay
from bench.common import Budget
from bench.gpu import memcheck, memcheck_allocator
from bench.partial import Partial
from bench.report_files import StageFile
from bench.report_tables import render

MIB = 1 << 20
WATCHED = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VATTN_BUDGET")
GPU = argparse.Namespace(device="cuda", rounds=2)


def row(number: int, way: str, steps: list[float], used: int, **more: Any) -> dict[str, Any]:
    figures = {"peak_used_bytes": used * MIB, "peak_requested_bytes": 100 * MIB}
    return with_ratio(
        {"round": number, "way": way, "step_us": steps, "steady_calls": 0, **figures, **more}
    )


TRAINING = [
    row(1, "native", [100.0, 200.0], 150),
    row(1, "expandable", [110.0, 220.0], 110),
    row(1, "vattn", [99.0, 220.0], 104),
    row(2, "vattn", [98.0, 202.0], 103, steady_calls=2),
    row(2, "native", [98.0, 200.0], 151),
]


def measured(targets: list[Any]) -> dict[str, float | None]:
    return {target.name: target.measured for target in targets}


def test_the_programs_run() -> None:
    found = run("vattn", torch.device("cpu"), None)
    size = SIZES["cpu"]
    assert {len(found["training"][key]) for key in ("first_us", "step_us", "tokens")} == {
        size.steps
    }
    assert len(found["training"]["steady_us"]) == 2 * (size.steps // 4)
    assert found["fragments"]["operations"] > 2 * size.phases
    assert [pair["bytes"] for pair in found["pairs"]] == list(PAIR_BYTES)
    assert with_ratio(found["training"])["ratio"] is None


def test_ratios_are_of_the_same_step_of_the_same_round() -> None:
    assert step_ratio(TRAINING, "native") == pytest.approx((1.0 + 1.01) / 2)
    assert step_ratio(TRAINING, "expandable") == pytest.approx((0.9 + 1.0) / 2)
    assert step_ratio(TRAINING[:2], "native") is None


def test_targets_take_the_worst_of_ours_and_the_best_of_theirs() -> None:
    models = [{"off_by": 0.001}, {"off_by": 0.05}]
    targets = make_targets(GPU, {"training": TRAINING, "fragments": TRAINING[:3], "models": models})
    found = measured(targets)
    assert found["GPU memory / requested, training"] == pytest.approx(1.04)
    assert found["the same / PyTorch's lower one"] == pytest.approx(104 / 110)
    assert found["driver calls, steps of one length"] == 2
    assert found["peaks of the models of PyTorch's policies, off by"] == 0.05
    assert [target.met for target in targets] == [True, True, True, True, True, False, False]
    assert set(measured(make_targets(GPU, {})).values()) == {None}
    assert make_targets(argparse.Namespace(device="cpu"), {"training": TRAINING}) == []


def test_ways_take_turns_and_one_that_fails_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, bool]] = []

    def fake(way: str, device: str, traces: Path | None, limit_s: float) -> dict[str, Any]:
        order.append((way, traces is not None))
        if len(order) == 2:
            raise RuntimeError("expandable ended with 1")
        figures = {key: TRAINING[0][key] for key in ("peak_used_bytes", "peak_requested_bytes")}
        steps = {"step_us": [1.0], "steady_calls": 0}
        return {"training": steps | figures, "fragments": figures, "pairs": [{"bytes": 512}]}

    monkeypatch.setattr(bench.allocator_gpu, "run_way", fake)
    out = Partial(tmp_path / "x.json", "allocator_gpu", {}, lambda _: [])
    args = argparse.Namespace(device="cpu", rounds=2)
    Bench(args, Budget(None), out, tmp_path).all()
    assert [way for way, _ in order] == [*WAYS, *WAYS[1:], WAYS[0]]
    assert [records for _, records in order] == [True] * 3 + [False] * 3
    assert [failed["part"] for failed in out.results["failed"]] == ["round 1 expandable"]
    assert len(out.results["training"]) == 5
    assert out.end(rows=("training",)) == 1


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)nothing ended with 2.*invalid choice: 'nothing'"):
        bench.allocator_gpu.run_way("nothing", "cpu", None, 100)


@pytest.mark.parametrize(("policy", "peak"), [("native", 22), ("expandable", 22)])
def test_a_recording_goes_through_the_model_of_its_policy(
    tmp_path: Path, policy: str, peak: int
) -> None:
    """Segments by hand: one of 2 MiB for small blocks; 20 MiB, or ten pages of 2 MiB, for large."""
    builder = TraceBuilder()
    builder.request(0x1000, 4096)
    for i in range(2):
        builder.request(0x2000 + i, 9 * MIB + 512 * 1024)
    path = tmp_path / f"{policy}.npz"
    builder.build("by_hand", {}).save(path)
    figures = {"peak_reserved_bytes": 20 * MIB, "peak_allocated_bytes": 19 * MIB}
    found = modelled(Replay.find(), path, policy, 1 << 30, figures)
    assert found["modelled_bytes"] == peak * MIB
    assert found["off_by"] == pytest.approx(peak / 20 - 1)
    assert found["peak_live_bytes"] == 19 * MIB + 4096


def test_the_program_for_memcheck() -> None:
    assert memcheck_allocator.run("cpu") == {"steps": memcheck_allocator.STEPS}
    module = "bench.gpu.memcheck_allocator"
    assert memcheck.command("tool", module)[-3:] == ["-m", module, "--run"]
    assert memcheck.command("tool")[-2:] == ["bench.gpu.memcheck", "--run"]


def test_pytorchs_settings_are_those_of_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("VATTN_BUDGET", "1GiB")
    told: list[set[str]] = []

    def fake(command: list[str], env: dict[str, str], **_: Any) -> Any:
        told.append({value for name, value in env.items() if name in WATCHED})
        Path(command[command.index("--json") + 1]).write_text("{}")
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr("bench.allocator_gpu.subprocess.run", fake)
    for way in WAYS:
        bench.allocator_gpu.run_way(way, "cpu", tmp_path, 1)
    assert told == [{"expandable_segments:False"}, {"expandable_segments:True"}, set()]


def test_what_is_built_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.allocator_gpu_models.subprocess.run", None)
    assert find_or_build(1) == Replay.find()


def test_without_cmake_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> Replay:
        raise FileNotFoundError("not built")

    monkeypatch.setattr("bench.allocator_gpu_models.Replay.find", missing)
    monkeypatch.setattr("bench.allocator_gpu_models._tool", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no cmake"):
        find_or_build(1)
    monkeypatch.setattr("bench.allocator_gpu_models._tool", lambda name: "/bin/false")
    with pytest.raises(RuntimeError, match="was not built"):
        find_or_build(5)


def test_the_report_has_a_row_for_each_way() -> None:
    pairs = [{"way": "vattn", "bytes": 4 * MIB, "ns": 900.0}]
    results = {"training": TRAINING, "fragments": TRAINING[:3], "pairs": pairs}
    document = {"stage": "allocator-bench", "status": "passed", "commit": "0123456789"}
    file = StageFile(
        "bench/results/x/allocator-bench.json", "x", document | {"results": {"results": results}}
    )
    lines = [line for line in render([file]).splitlines() if line.startswith("| vattn |")]
    assert len(lines) == 1
    assert lines[0].startswith("| vattn | 0.15 | 1.04 | 2 | 1.04 | 900 | [allocator-bench.json]")
