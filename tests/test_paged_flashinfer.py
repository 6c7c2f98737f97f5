"""FlashInfer's wrappers over blocks: what they are planned with, and what nobody waits for."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.paged import flashinfer
from bench.paged.block_lists import block_lists
from bench.paged.calls import make_call
from tests import paged_flashinfer
from tests.attention_reference import spec_of, variants
from tests.models import one_thread
from tests.paged_installed import installed_kernels
from tests.paged_kernels import PagedRecorder
from tests.paged_world import run_mixed_steps, world_of
from vattn.attention.operators import Unavailable
from vattn.attention.upload import Uploader

CPU = torch.device("cpu")
VARIANTS = variants(spec_of())


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def recorder() -> PagedRecorder:
    return PagedRecorder()


@pytest.fixture
def installed(recorder: PagedRecorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with installed_kernels(recorder, monkeypatch):
        yield


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("variant", [name for name, spec in VARIANTS.items() if not spec.sinks])
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_flashinfer(variant: str, block_tokens: int, recorder: PagedRecorder) -> None:
    specs = [VARIANTS[variant], replace(VARIANTS[variant], scale=0.3)]
    kernel = flashinfer.FlashInfer.create(specs, CPU)
    recorder.calls.clear()
    run_mixed_steps(world_of(kernel, specs, block_tokens))
    assert {name for name, _ in recorder.calls} == {"plan", "decode", "chunks"}


@pytest.mark.usefixtures("installed")
def test_flashinfer_plans_once_per_kind_of_layer(recorder: PagedRecorder) -> None:
    plain, window = spec_of(heads=8), spec_of(heads=8, window=20)
    specs = [plain, window, plain, window, plain]
    kernel = flashinfer.FlashInfer.create(specs, CPU)
    world = world_of(kernel, specs, 16)
    a, b = world.open(), world.open()
    world.step((), [(a, 33), (b, 40)])
    recorder.calls.clear()
    world.step([a, b])
    assert [name for name, _ in recorder.calls] == ["plan"] * 2 + ["decode"] * 5


@dataclass
class Mark:
    """An event that counts how often somebody waited for it."""

    marks: list[Mark]
    recorded: int = 0
    awaited: int = 0

    def __post_init__(self) -> None:
        self.marks.append(self)

    def record(self) -> None:
        self.recorded += 1

    def synchronize(self) -> None:
        assert self.recorded, "nothing was copied yet"
        self.awaited += 1


@pytest.mark.usefixtures("installed")
def test_a_plan_waits_for_no_other_plan_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step in flight, what was just launched is behind that step: nobody may wait for it."""
    marks: list[Mark] = []
    monkeypatch.setattr(flashinfer, "_event", lambda device: Mark(marks))
    specs = [spec_of(heads=8), spec_of(heads=8, window=20)]
    world = world_of(flashinfer.FlashInfer(None, CPU), specs, 16)
    a, b = world.open(), world.open()
    world.step((), [(a, 33)])
    world.step([a], [(b, 40)])
    assert [mark.recorded for mark in marks] == [2, 2, 1, 1]
    assert [mark.awaited for mark in marks] == [1, 1, 0, 0]  # of the step before
    world.step([a], [(b, 4)])
    assert [mark.awaited for mark in marks] == [2, 2, 1, 1]


def test_lists_have_no_gaps_and_are_of_the_table_on_the_device() -> None:
    table = np.array([[5, 6, 7], [9, 9, 9], [3, 4, 9]], np.int32)
    call = make_call(table, [33, 16, 17], [1, 1, 3], 16, CPU)
    # A view of wider rows, as the engine's calls have it; nothing of it is read on the host.
    wide = torch.full((4, 8), 99, dtype=torch.int32)
    wide[1:, :3] = torch.from_numpy(table)

    def nothing() -> Any:
        raise AssertionError("the table was read on the host")

    assert call.host is not None
    host = replace(call.host, make_table=nothing)
    lists = block_lists(replace(call, table=wide[1:, :3], host=host), Uploader(CPU))
    assert lists.starts.tolist() == [0, 3, 4, 6]
    assert lists.blocks.tolist() == [5, 6, 7, 9, 3, 4]
    assert lists.last.tolist() == [1, 16, 1]
    assert lists.query_starts.tolist() == [0, 1, 2, 5]
    assert {each.dtype for each in lists} == {torch.int32}


def test_newer_versions_take_the_names_in_another_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 0.7 on: ``plan(self, indptr, ..., *positional, **named)`` over ``_plan_impl``."""
    wrappers = paged_flashinfer.flashinfer(PagedRecorder())
    module = types.ModuleType("flashinfer")
    for wrapper in wrappers:
        setattr(module, wrapper.__name__, wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    inner = wrappers[0].plan

    def plan(self: Any, *positional: Any, **named: Any) -> None:
        inner(self, *positional, **named)

    monkeypatch.setattr(wrappers[0], "plan", plan)
    with pytest.raises(Unavailable, match="plan has no argument"):
        flashinfer.load()
    monkeypatch.setattr(wrappers[0], "_plan_impl", inner, raising=False)
    assert flashinfer.load() == wrappers


def test_flashinfer_that_is_absent_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="flashinfer does not load"):
        flashinfer.load()
    module = types.ModuleType("flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    with pytest.raises(Unavailable, match="has no BatchDecodeWithPagedKVCacheWrapper"):
        flashinfer.load()
    decode, prefill = paged_flashinfer.flashinfer(PagedRecorder())
    for name, wrapper in zip(
        ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"),
        (decode, prefill),
        strict=True,
    ):
        setattr(module, name, wrapper)

    def run(self: Any, q: Any) -> None:
        del self, q

    monkeypatch.setattr(prefill, "run", run)
    with pytest.raises(Unavailable, match=r"run has no argument paged_kv_cache"):
        flashinfer.load()


@pytest.mark.usefixtures("installed")
def test_flashinfer_that_cannot_compile_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(self: Any, **given: Any) -> None:
        raise FileNotFoundError("nvcc")

    kernel = flashinfer.FlashInfer.create([spec_of()], CPU)
    monkeypatch.setattr(kernel._decode, "plan", plan)
    monkeypatch.setattr(flashinfer, "load", lambda: (kernel._decode, kernel._prefill))
    with pytest.raises(Unavailable, match="does not work here: FileNotFoundError: nvcc"):
        flashinfer.FlashInfer.create([spec_of()], CPU)
