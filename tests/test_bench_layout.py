"""The layout benchmark's parts: the order of its cells, what it suggests, how it times a pair."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

import bench.layout
import bench.layout_cells
from bench import graph_clock
from bench.common import Json, Pairs
from bench.kernels import Kernel, Prepare
from bench.layout_cells import Bench, Cell
from bench.layout_choice import best, compare, front, suggest, targets
from bench.layout_grid import Grid
from bench.layout_points import DECISIVE, LayoutChoice, Model, Point, cells, points

MIB = 1 << 20
MODEL = Model(layers=4, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32)


def token(per_region: int | None, mib: int = 2) -> LayoutChoice:
    return LayoutChoice("token", per_region, mib * MIB)


# The order of the grid ----------------------------------------------------------------------------


def test_a_cut_leaves_the_decisive_points_of_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.layout, "gpu_missing", lambda: None)
    args, _ = bench.layout.parse(["--device", "cuda"])
    assert set(DECISIVE) <= set(points(args))
    every = cells(args)
    layouts = len(args.pages) * len(args.layers_per_region)
    assert len(every) == len(set(every)) == layouts * len(points(args))
    first = every[: layouts * len(DECISIVE)]
    assert {point for _, point in first} == set(DECISIVE)
    # One page size after the other, so that pages are made once; the smallest ones first.
    pages = [choice.page_bytes for choice, _ in first]
    assert list(dict.fromkeys(pages)) == [mib * MIB for mib in (2, 32, 8, 4, 16)]
    assert pages == sorted(pages, key=list(dict.fromkeys(pages)).index)
    # Within a page size every layout has a point before the next point begins.
    per_page = len(args.layers_per_region)
    assert [point for _, point in first[:per_page]] == [DECISIVE[0]] * per_page


def test_with_other_lengths_every_point_is_decisive() -> None:
    args, model = bench.layout.parse(["--device", "cpu", "--small"])
    assert (model.layers, args.pages) == (2, [16 << 10])
    assert [(choice.layers_per_region, point.queries) for choice, point in cells(args)] == [
        *((1, 1), (None, 1), (1, 4), (None, 4))
    ]


# What is suggested --------------------------------------------------------------------------------


def cell(choice: LayoutChoice, point: Point, ratio: float, kernel: str = "a/flat") -> Json:
    return asdict(choice) | asdict(point) | {"kernel": kernel, "ratio": ratio}


def row(choice: LayoutChoice, live_share: float) -> Json:
    return asdict(choice) | {"live_share": live_share}


ROWS = [row(token(1), 0.84), row(token(4), 0.952), row(token(8), 0.975), row(token(None), 0.99)]
P = Point(16384, 8, 1)


def test_the_fastest_of_the_frugal_is_suggested() -> None:
    ratios = {1: 1.0, 4: 0.99, 8: 0.97, None: 0.8}
    found = suggest([cell(token(n), P, ratio) for n, ratio in ratios.items()], ROWS)
    assert found["choice"]["layers_per_region"] == 4
    assert found["choice"]["meets"]
    assert [s["layers_per_region"] for s in found["front"]] == [1, 4, 8, None]
    assert found["compared"] == [{"kernel": "a/flat", "length": 16384, "batch": 8, "queries": 1}]
    assert found["per_kernel"]["a/flat"] == found["choice"]


def test_of_layouts_as_fast_the_one_that_wastes_least_is_suggested() -> None:
    ratios = {1: 1.0, 4: 0.995, 8: 0.99, None: 0.98}
    found = suggest([cell(token(n), P, ratio) for n, ratio in ratios.items()], ROWS)
    assert found["choice"]["layers_per_region"] == 8  # within 0.01 of 4, all are not


def test_a_slow_suggestion_says_so() -> None:
    found = suggest([cell(token(n), P, 0.9) for n in (4, 8)], ROWS)
    assert not found["choice"]["meets"]
    assert "no such layout reaches a speed of 0.98" in found["reason"]
    found = suggest([cell(token(1), P, 1.0)], ROWS)
    assert found["choice"]["layers_per_region"] == 1
    assert "wastes least" in found["reason"]
    assert suggest([], ROWS)["choice"] is None


def test_layouts_are_compared_over_what_they_have_in_common() -> None:
    found = [cell(token(4), point, 0.9) for point in DECISIVE[:4]]
    found += [cell(token(8), point, 0.8) for point in DECISIVE[:2]]
    found += [cell(token(None), DECISIVE[0], 1.0)]  # cut after one: too little to compare
    found += [cell(token(4), Point(64, 1, 1), 0.1)]  # not decisive: not compared
    speeds, common = compare(found, ROWS)
    assert {s.choice for s in speeds} == {token(4), token(8)}
    assert [key[1:] for key in common] == sorted(
        (p.length, p.batch, p.queries) for p in DECISIVE[:2]
    )
    four = next(s for s in speeds if s.choice == token(4))
    assert four.speed == pytest.approx(0.9)
    assert four.speed_all == pytest.approx((0.9**4 * 0.1) ** 0.2)
    assert (four.worst, four.cells) == (0.9, 5)
    chosen, _ = best(speeds)
    assert chosen == four
    # Faster and more wasteful: both are on the front.
    assert [s.choice for s in front(speeds)] == [token(4), token(8)]


def test_targets_are_of_the_default_layout() -> None:
    found = targets(token(4), [cell(token(4), P, 0.99), cell(token(8), P, 0.5)], 0.952)
    assert [t.met for t in found] == [True, True]
    assert [t.met for t in targets(token(4), [cell(token(8), P, 0.5)], None)] == [None, None]


# One cell -----------------------------------------------------------------------------------------


def test_short_work_is_repeated_and_long_work_is_timed_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU: graphs, replayed until a timing is long enough; times are of one round of calls."""
    launched: list[str] = []
    seconds = 0.0

    def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    def clock(work: Callable[[], object]) -> float:
        before = len(launched)
        work()
        return seconds * (len(launched) - before)

    monkeypatch.setattr(bench.layout_cells, "capture", capture)
    monkeypatch.setattr(bench.layout_cells, "head_start_clock", clock)
    where = Bench("cpu", MODEL, (8,), pairs=15, max_bytes=1 << 20, kernel_s=0.1)
    where.device = "cuda"

    def side(name: str) -> list[Callable[[], Any]]:
        return [lambda: launched.append(name)] * 2

    seconds = 5e-6  # two calls in 10 us: 40 rounds make the 0.4 ms of a timing
    found = where.time_pair(side("base"), side("candidate"))
    assert found.pairs == 15
    assert found.base_us == pytest.approx(10)
    assert launched.count("candidate") == 2 * 40 * (15 + 2)
    seconds = 0.02  # a pair takes 80 ms, and 0.1 s are given
    found = where.time_pair(side("base"), side("candidate"))
    assert found.pairs == 5
    assert found.base_us == pytest.approx(40_000)


class Graph:
    """What ``bench.graph_clock`` uses of a CUDA graph: ``open`` from begin to end of a capture."""

    def __init__(self) -> None:
        self.open = False
        self.replays = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"  # other threads may call the driver
        self.open = True

    def capture_end(self) -> None:
        self.open = False
        raise_if_invalid, self.invalid = self.invalid, False
        if raise_if_invalid:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.replays += 1

    invalid = False


def test_calls_are_captured_after_they_have_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph()
    cuda = types.SimpleNamespace(
        CUDAGraph=lambda: graph, Stream=object, stream=lambda stream: contextlib.nullcontext()
    )
    monkeypatch.setattr(graph_clock, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[tuple[str, bool]] = []
    replay = graph_clock.capture([lambda: calls.append(("a", graph.open)), lambda: None])
    assert calls == [("a", False), ("a", True)]
    assert not graph.open
    graph_clock.repeated(replay, 3)()
    assert graph.replays == 3

    def refuse() -> None:
        if graph.open:
            graph.invalid = True
            raise ValueError("cannot be captured")

    with pytest.raises(ValueError, match="cannot be captured"):
        graph_clock.capture([refuse])
    assert not graph.open  # the next capture can begin


def test_all_layers_in_a_region_is_not_the_default_of_the_device() -> None:
    where = Bench("cpu", MODEL, (8,), pairs=1, max_bytes=1 << 24)
    with where.open(LayoutChoice("token", None, 1 << 14), Point(64, 1, 1)) as cache:
        assert [len(region.layers) for region in cache.layout.regions] == [4]
    with where.open(LayoutChoice("token", 2, 1 << 14), Point(64, 1, 1)) as cache:
        assert {len(region.layers) for region in cache.layout.regions} == {2}
    where.close()


# The grid -----------------------------------------------------------------------------------------


class Scripted(Bench):
    """Answers without a device; ``errors`` says what fails."""

    def __init__(self, errors: dict[tuple[str, int], Exception]) -> None:
        super().__init__("cpu", MODEL, (8,), pairs=1, max_bytes=1 << 40)
        self.errors = errors
        self.verified: list[LayoutChoice] = []

    def verify(self, choice: LayoutChoice, kernel: Kernel, prepare: Prepare) -> float:
        self.verified.append(choice)
        if ("verify", 0) in self.errors:
            raise self.errors["verify", 0]
        return 0.001

    def measure(self, choice: LayoutChoice, point: Point, kernels: dict[Kernel, Prepare]) -> Cell:
        if error := self.errors.get(("measure", point.length)):
            raise error
        pairs = dict.fromkeys(kernels, Pairs(1, 1.0, 1.0, 1.0, 1.0, 1.0))
        return Cell({"live_bytes": 1}, pairs)


KERNEL = Kernel("scripted", "flat", "cpu", (torch.float32,), lambda: prepare_nothing)


def prepare_nothing(problem: Any, k: torch.Tensor, v: torch.Tensor) -> Any:
    raise AssertionError


def run(errors: dict[tuple[str, int], Exception], budget_s: float = 60) -> tuple[Json, Scripted]:
    where = Scripted(errors)
    work = [(token(n, mib), Point(m, 1, 1)) for mib in (2, 4) for m in (64, 128) for n in (1, 4)]
    grid = Grid(where, {KERNEL: prepare_nothing}, 1e9, budget_s)
    return grid.run(work, lambda: None), where


def test_a_kernel_is_checked_once_for_layouts_that_differ_in_the_page_size_alone() -> None:
    found, where = run({})
    assert len(found["cells"]) == len(found["memory"]) == 8
    assert where.verified == [token(1), token(4)]
    assert found["failed"] == []


def test_a_cell_that_fails_is_lost_alone() -> None:
    found, _ = run({("measure", 64): MemoryError("64 is too much")})
    assert [c["length"] for c in found["cells"]] == [128] * 4
    assert {f["why"] for f in found["failed"]} == {"MemoryError: 64 is too much"}


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    found, where = run({("verify", 0): AssertionError("relative error 1")})
    assert found["cells"] == []
    assert len(found["failed"]) == len(where.verified) == 2


def test_nothing_is_tried_after_the_device_is_lost() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    found, _ = run({("measure", 128): error})
    assert [c["length"] for c in found["cells"]] == [64, 64]
    assert len(found["failed"]) == 2
    assert found["failed"][1]["why"].startswith("stopped: RuntimeError: CUDA error: an illegal")


def test_what_there_is_no_time_for_is_listed() -> None:
    found, where = run({}, budget_s=0)
    assert len(found["cut_for_time"]) == 8
    assert found["cut_for_time"][0] == "token lpr=1 page=2M 1x64"
    assert where.verified == []
