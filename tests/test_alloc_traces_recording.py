"""Traces of allocations are recorded: by the profiler, by a GPU's history, from all programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import bench.alloc_traces.record
from bench.alloc_traces import beam, moe, serving, training
from bench.alloc_traces.cpu_source import record_cpu
from bench.alloc_traces.cuda_source import record_cuda, trace_of_entries
from bench.alloc_traces.models import build_model, llama_config, mixtral_config
from bench.alloc_traces.program import Marks
from bench.alloc_traces.record import WORKLOADS
from bench.alloc_traces.trace_file import AllocTrace
from tests.alloc_trace_records import records_of
from tests.models import one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


# The profiler


def test_profiler_gives_sizes_and_lifetimes() -> None:
    older = [torch.empty(1 << 20)]

    def program(device: torch.device, marks: Marks) -> object:
        first = torch.empty(1000, device=device)
        kept = torch.empty(3, dtype=torch.uint8, device=device)
        torch.empty(0, device=device)  # no bytes, no request
        older.clear()  # was there before, so its release is not part of the trace
        for _ in range(2):
            marks.iteration(1)
            second = torch.empty(5, 7, dtype=torch.float64, device=device)
            third = torch.empty(9 << 20, dtype=torch.uint8, device=device)
            del second, third
        del first
        return kept

    trace = record_cpu("tiny", program, {"of": "a test"})
    iteration = [(2, 1, 280), (3, 1, 9 << 20), (2, 1, 0), (3, 1, 0)]
    assert records_of(trace) == [(0, 0, 4000), (1, 0, 3), *iteration, *iteration, (0, 0, 0)]
    # The last iteration ends with the trace, and so has the first block's release.
    assert trace.steady_from == -1
    assert trace.peak_live_bytes == (9 << 20) + 4096 + 512 + 512
    assert trace.live_at_end == 512
    assert trace.meta == {
        "recorded_on": "cpu, torch.profiler",
        "torch": torch.__version__,
        "of": "a test",
        "iterations": 2,
        "releases_of_older_blocks": 0,
    }


def test_profiler_sees_the_backward_pass() -> None:
    def program(device: torch.device, marks: Marks) -> object:
        weight = torch.ones(300, 200, device=device, requires_grad=True)
        for _ in range(3):
            marks.iteration()
            (torch.ones(50, 300, device=device) @ weight).sum().backward()  # type: ignore[no-untyped-call]
            weight.grad = None
        return weight

    trace = record_cpu("backward", program, {})
    weight_bytes = 300 * 200 * 4
    # The weight, its three gradients.
    assert np.count_nonzero(trace.sizes == weight_bytes) == 4
    assert trace.steady_from > 0
    assert trace.live_at_end == -(-weight_bytes // 512) * 512


# The history of a GPU


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": []}


def test_snapshot_becomes_a_trace() -> None:
    entries = [
        entry("free_completed", 0x900, 64),  # asked for before the recording
        entry("free_requested", 0x800, 64),
        entry("free_completed", 0x800, 64),
        entry("segment_alloc", 0x1000, 2 << 20, 111),
        entry("alloc", 0x1000, 1000, 111),
        entry("segment_map", 0x9000, 2 << 20, 222),
        entry("alloc", 0x9000, 3, 222),
        entry("free_requested", 0x1000, 1000, 111),
        {"action": "oom", "size": 1 << 40, "stream": 111, "device_free": 5, "frames": []},
        # Not done on its streams yet, so its address is not taken by the next one.
        entry("alloc", 0x1400, 1000, 111),
        entry("free_completed", 0x1000, 1000, 111),
        entry("alloc", 0x1000, 500, 222),
        entry("free_requested", 0x1400, 1000, 111),
        entry("free_completed", 0x1400, 1000, 111),
        entry("segment_unmap", 0x9000, 2 << 20, 222),
        entry("segment_free", 0x1000, 2 << 20, 111),
        entry("snapshot", 0, 0),
    ]
    trace = trace_of_entries("gpu", entries, {"by": "hand"})
    assert records_of(trace) == [
        (0, 0, 1000),
        (1, 1, 3),
        (0, 0, 0),
        (0, 0, 1000),
        (2, 1, 500),
        (0, 0, 0),
    ]
    assert trace.steady_from == -1
    assert trace.meta == {"by": "hand", "iterations": 0, "releases_of_older_blocks": 1}


def test_snapshot_of_steady_iterations() -> None:
    pair = [entry("alloc", 0x2000, 40), entry("free_requested", 0x2000, 40)]
    first = [entry("alloc", 0x1000, 8)]
    # Iterations that begin after 1, 2 and 3 requests: at the next one.
    trace = trace_of_entries("gpu", first + 3 * pair, {}, [1, 2, 3])
    assert (trace.meta["iterations"], trace.steady_from) == (3, 1)


def test_snapshot_refused() -> None:
    with pytest.raises(ValueError, match="entry 1 of the snapshot has action 'moved'"):
        trace_of_entries("gpu", [entry("alloc", 1, 1), entry("moved", 1, 1)], {})
    with pytest.raises(ValueError, match="nothing was allocated"):
        trace_of_entries("gpu", [entry("free_completed", 1, 1)], {})
    with pytest.raises(ValueError, match="where a block is alive"):
        trace_of_entries("gpu", 2 * [entry("alloc", 1, 1)], {})
    with pytest.raises(ValueError, match="history of cpu cannot be recorded"):
        record_cuda("gpu", lambda device, marks: None, {}, CPU)


class FakeCuda:
    """What ``record_cuda`` calls of torch, without a GPU: a history of two blocks on two streams.

    Args:
        patch: puts the calls in torch's place.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.history: list[str | None] = []  # what was switched on, or None for off
        self.stream: Any = FakeStream("first")
        self.requests = 5  # some were there before
        cuda = torch.cuda
        patch.setattr(cuda, "current_device", lambda: 1)
        patch.setattr(cuda, "synchronize", lambda device: None)
        patch.setattr(cuda, "get_device_name", lambda device: f"a GPU, {device}")
        patch.setattr(cuda, "current_stream", lambda device: self.stream)
        patch.setattr(cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(cuda, "Stream", lambda device: FakeStream("second"))
        patch.setattr(
            cuda, "memory_stats", lambda device: {"allocation.all.allocated": self.requests}
        )
        patch.setattr(cuda.memory, "_record_memory_history", self.switch)
        patch.setattr(cuda.memory, "_snapshot", self.snapshot)

    def switch(self, enabled: str | None, **options: Any) -> None:
        assert enabled is None or options == {"context": None, "clear_history": True}
        self.history.append(enabled)

    def snapshot(self) -> dict[str, Any]:
        assert self.history == ["all"]
        alive = [entry("alloc", 0x1000, 100, 7), entry("alloc", 0x2000, 200, 8)]
        return {"segments": [], "device_traces": [[], alive]}


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other.name)


def test_history_of_a_gpu_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)

    def program(device: torch.device, marks: Marks) -> object:
        assert device == torch.device("cuda", 1)
        fake.requests += 1
        marks.iteration(1)
        assert (fake.stream.name, fake.stream.waited) == ("second", ["first"])
        fake.requests += 1
        return None

    trace = record_cuda("gpu", program, {"of": "a test"}, torch.device("cuda"))
    assert records_of(trace) == [(0, 0, 100), (1, 1, 200)]
    assert trace.meta["iterations"] == 1
    assert trace.meta["recorded_on"] == "a GPU, cuda:1, torch's memory history"
    assert (fake.history, fake.stream.name) == (["all", None], "first")


def test_history_ends_with_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)

    def program(device: torch.device, marks: Marks) -> object:
        marks.iteration(1)
        raise RuntimeError("program")

    with pytest.raises(RuntimeError, match="program"):
        record_cuda("gpu", program, {}, torch.device("cuda", 1))
    assert (fake.history, fake.stream.name) == (["all", None], "first")


# The programs, small


def tiny_llama() -> LlamaConfig:
    config = llama_config()
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})
    config.update({"vocab_size": 256, "layer_types": None})
    return config


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workloads with tiny models and few steps."""
    experts = mixtral_config()
    experts.update({"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1})
    experts.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})
    experts.update({"vocab_size": 256})
    for module in (training, beam, serving):
        monkeypatch.setattr(module, "llama_config", tiny_llama)
    monkeypatch.setattr(moe, "mixtral_config", lambda: experts)
    monkeypatch.setattr(training, "VOCABULARY", 256)
    for name, value in {"_VARYING_STEPS": 3, "_STEADY_STEPS": 4, "_STEADY_TOKENS": 8}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(moe, "_STEPS", 2)
    monkeypatch.setattr(beam, "_BATCHES", ((2, 9, 4),))
    for name, value in {"_REQUESTS": 6, "_LONGEST_PROMPT": 20, "_LONGEST_ANSWER": 5}.items():
        monkeypatch.setattr(serving, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_record(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.alloc_traces.record.main(["--only", name, "--out", str(tmp_path)]) == 0
    trace = AllocTrace.load(tmp_path / f"{name}.npz")
    assert trace.name == name
    assert f"{trace.operations} operations" in capsys.readouterr().out
    assert trace.live_at_end > 0  # the weights
    assert trace.meta["iterations"] >= 1
    assert (trace.steady_from >= 0) == (name == "train_steady")
    assert set(trace.streams.tolist()) == ({0, 1} if name == "two_streams" else {0})


@pytest.mark.usefixtures("small")
def test_experts_sizes_follow_the_routing() -> None:
    """Rows of the experts' inputs differ between experts of one step."""
    trace = record_cpu("moe", moe.moe, {})
    gate_bytes = 2 * 16 * 4  # of one token: the gate and the up projection of an expert
    rows = {int(size) // gate_bytes for size in trace.sizes if size and size % gate_bytes == 0}
    assert len(rows) > 6


@pytest.mark.parametrize("joining", [1, 3])
def test_served_tokens_are_those_of_lone_requests(
    joining: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, joining and leaving change no request's tokens."""
    monkeypatch.setattr(serving, "_JOINING", joining)
    drawn: list[torch.Tensor] = []
    draw: Callable[..., torch.Tensor] = training.draw_tokens

    def kept(count: tuple[int, int], device: torch.device) -> torch.Tensor:
        drawn.append(draw(count, device) % 256)
        return drawn[-1]

    monkeypatch.setattr(serving, "draw_tokens", kept)
    model = build_model(tiny_llama(), CPU).eval()
    requests = [serving.Request(7, 20), serving.Request(12, 2), serving.Request(4, 20)]
    group = serving.Group(model, CPU, requests)
    for _ in range(6):
        group.step()
    rows = [(batch, row) for batch in drawn for row in range(len(batch))]
    stayed = [(requests[i].prompt, rows[i], i) for i in (0, 2)]
    for place, (prompt, (batch, row), number) in enumerate(stayed):
        tokens = batch[row : row + 1, -prompt:]
        steps = 6 - (number if joining == 1 else 0)
        alone = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=1 + steps,
            do_sample=False,
        )
        assert group._next[place].item() == alone[0, -1].item()
        assert int(group._mask[place].sum()) == prompt + steps
    assert len(group._next) == 2
