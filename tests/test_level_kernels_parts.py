"""The kernel level's parts: the order of its cells, blocks, and how it times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bench.device import device_clock
from bench.levels.kernels import time as kernels_time
from bench.levels.kernels.blocks import CONSECUTIVE, SHUFFLED, make_blocks, place_blocks
from bench.levels.kernels.cells import Cells
from bench.levels.kernels.grid import SHAPES, Case, Phase, cases, distinct, shapes_json
from bench.levels.kernels.time import Effort, runners, take_turns
from bench.problem import Problem
from tests.kernel_sides import Blocks

# The grid -----------------------------------------------------------------------------------------


def test_a_cut_leaves_every_shape_at_its_telling_points() -> None:
    shapes = distinct(["llama-3-8b", "yi-6b"])
    phases: list[Phase] = ["decode", "prefill"]
    grid = cases(shapes, phases, [1, 8], [128, 512, 2048], [128, 512], 256, 1)
    assert grid[:4] == [
        Case("decode", shapes[0], 8, 512),
        Case("prefill", shapes[0], 1, 512, 256),
        Case("decode", shapes[1], 8, 512),
        Case("prefill", shapes[1], 1, 512, 256),
    ]
    assert Case("prefill", shapes[0], 1, 128, 128) in grid  # shorter than a chunk: whole
    assert len(grid) == len(set(grid)) == 6 + 2 + 2
    assert {case.shape for case in grid[4:]} == {shapes[0]}  # one is measured at every point
    assert len(cases(shapes, ["decode"], [1], [64, 128], [64], 0, 2)) == 4
    (whole,) = cases(shapes[:1], ["prefill"], [1], [64], [64], 0, 1)
    assert whole.queries == 64


def test_models_with_the_same_attention_are_one_shape() -> None:
    assert [s.name for s in distinct(["qwen3-8b", "llama-3-8b", "yi-6b"])] == ["qwen3-8b", "yi-6b"]
    found = shapes_json(["llama-3-8b", "qwen3-8b"])
    assert [(s["name"], s["also"]) for s in found] == [("llama-3-8b", ["qwen3-8b"])]
    with pytest.raises(ValueError, match=r"no shape gpt-5; there are llama-3-8b"):
        distinct(["gpt-5"])
    for name, whole in (("llama-3-8b-tp2", "llama-3-8b"), ("yi-34b-tp2", "yi-34b")):
        assert SHAPES[name].heads * 2 == SHAPES[whole].heads
        assert SHAPES[name].kv_heads * 2 == SHAPES[whole].kv_heads


# Blocks -------------------------------------------------------------------------------------------


def test_blocks_are_scattered_over_the_pool_and_nobody_has_block_0() -> None:
    table = place_blocks([100, 33], 16, SHUFFLED, spare=5)
    assert table.shape == (2, 7)
    used = [*table[0].tolist(), *table[1, :3].tolist()]
    assert len(set(used)) == 10
    assert min(used) > 0
    assert max(used) <= 15
    assert used != sorted(used)
    assert table[1, 3:].tolist() == [0] * 4
    assert place_blocks([100, 33], 16, CONSECUTIVE)[0].tolist() == list(range(1, 8))


@pytest.mark.parametrize("order", ["token", "head"])
def test_blocks_hold_the_tokens_of_the_slots(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "order", order)
    k, v = (torch.randn(3, 64, 2, 8) for _ in range(2))
    problem = Problem(torch.randn(2, 1, 4, 8), [2, 0], [40, 7])
    made = make_blocks(
        Blocks(), 16, problem, [(k, v)], placement=SHUFFLED, spare=3, unread=float("nan")
    )
    for pool, kv in zip(made.layers[0], (k, v), strict=True):
        blocks = pool.permute(1, 2, 0, 3) if order == "head" else pool
        assert blocks.shape == (1 + 4 + 3, 16, 2, 8)
        for row, slot, length in zip(made.table, problem.slots, problem.lengths, strict=True):
            ids = torch.from_numpy(row.astype(np.int64))
            assert torch.equal(blocks[ids].flatten(0, 1)[:length], kv[slot, :length])
        assert int(blocks.isnan().all(dim=(1, 2, 3)).sum()) == 3  # the spare ones
        assert (blocks[0] == 0).all()


# Timing -------------------------------------------------------------------------------------------


class Scripted:
    """Runs that take given seconds, and a clock that knows them."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.order: list[str] = []

    def runs(self) -> dict[str, Callable[[], object]]:
        return {name: lambda name=name: self.order.append(name) for name in self.seconds}  # type: ignore[misc]

    def clock(self, run: Callable[[], object]) -> float:
        before = len(self.order)
        run()
        return sum(self.seconds[name] for name in self.order[before:])


def test_every_side_is_timed_beside_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Scripted(virtual=1.0, ordinary=1.0, paged=3.0)
    monkeypatch.setattr(kernels_time, "wall_clock", it.clock)
    found = take_turns(it.runs(), "virtual", it.clock, Effort(4, 3, 1e9), calls=2)
    assert set(found) == {"ordinary", "paged"}
    assert found["paged"].ratio == 3.0  # above 1: contiguous is faster
    assert len(found["paged"].repeats) == 3
    assert found["paged"].base_us == pytest.approx(1.5e6)
    assert found["paged"].candidate_us == pytest.approx(0.5e6)
    timed = it.order[6:]  # behind a warm-up and a first look of each
    assert len(timed) == 3 * 4 * 2 * 2
    assert all("virtual" in timed[i : i + 2] for i in range(0, len(timed), 2))
    assert timed[:4] == ["ordinary", "virtual", "paged", "virtual"]
    assert timed[4:8] == ["virtual", "ordinary", "virtual", "paged"]


def test_long_work_is_timed_less_often_and_short_work_is_repeated() -> None:
    it = Scripted(virtual=1.0, paged=1.0)
    take_turns(it.runs(), "virtual", it.clock, Effort(9, 3, 18.0), calls=1)
    assert len(it.order) == 4 + 3 * 3 * 2  # 2 s a round, 18 s in 3 repeats
    it = Scripted(virtual=1.0, paged=1.0)
    take_turns(it.runs(), "virtual", it.clock, Effort(9, 3, 0.1), calls=1)
    assert len(it.order) == 4 + 3 * 2 * 2
    it = Scripted(virtual=1e-4, paged=2e-4)  # a clock of a GPU ticks too slowly for one
    found = take_turns(it.runs(), "virtual", it.clock, Effort(2, 1, 1e9), calls=1)
    assert len(it.order) == 4 + 1 * 2 * 2 * 4
    assert found["paged"].candidate_us == pytest.approx(100)


def test_what_cannot_be_captured_is_timed_by_events_on_every_side() -> None:
    class NoGraphs(Cells):
        def runner(self, calls: Any) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing")

    model = SHAPES["qwen3-0.6b"].model(torch.float32)
    where = NoGraphs("cpu", model, (1,), 1, 1 << 20)
    called: list[str] = []
    sides: Any = {name: [lambda name=name: called.append(name)] * 2 for name in ("a", "b")}
    runs, clock, how = runners(where, sides)
    assert (clock, how) == (device_clock, "events")
    runs["a"](), runs["b"]()
    assert called == ["a", "a", "b", "b"]
