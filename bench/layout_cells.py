"""One cell of the layout benchmark: a kernel on virtual slots against ordinary tensors."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from bench.common import Clock, Json, Pairs, measure_pairs, wall_clock
from bench.device import last_level_cache_bytes
from bench.graph_clock import capture, head_start_clock, in_turn, repeated
from bench.kernels import Kernel, Prepare
from bench.layout_fill import TOLERANCE, fill, relative_error
from bench.layout_points import LayoutChoice, Model, Point
from bench.problem import Attend, Problem, reference
from bench.waste import Footprint, footprint
from vattn import KVCache, PagePool
from vattn.kv.layout import round_up

# A wrong result, an error of the device, too little memory: what was tried is lost, not the rest.
FAILURES = (AssertionError, RuntimeError, MemoryError)

# One timing takes at least this long on a GPU, whose clock ticks every half microsecond.
_TIMING_S = 4e-4
_FEWEST_PAIRS = 5


@dataclass
class Cell:
    """One point on one layout: what it takes, and each kernel's times or why it has none."""

    memory: Json
    pairs: dict[Kernel, Pairs] = field(default_factory=dict)
    failed: dict[Kernel, str] = field(default_factory=dict)


class Bench:
    """A device, a model and tile sizes; cells are measured on them one after the other.

    Args:
        device: "cpu" or "cuda".
        model: whose layers they are.
        tiles: of the kernels, in tokens.
        pairs: timings of each side, fewer where one takes long.
        max_bytes: that a cell may take, both sides together.
        kernel_s: seconds for the timings of one kernel in one cell, about.
    """

    def __init__(
        self,
        device: str,
        model: Model,
        tiles: Sequence[int],
        pairs: int,
        max_bytes: int,
        kernel_s: float = 1.0,
    ) -> None:
        self.device = device
        self.model = model
        self.tiles = tuple(tiles)
        self.pairs = pairs
        self.max_bytes = max_bytes
        self.kernel_s = kernel_s
        self.cache_bytes = last_level_cache_bytes(device)
        self._pools: dict[int, PagePool] = {}
        self._random = random.Random(0)

    def pool(self, page_bytes: int) -> PagePool:
        """One pool at a time: pages of one size serve every cell of that size."""
        if page_bytes not in self._pools:
            self._pools.clear()
            self._pools[page_bytes] = PagePool(
                self.device, page_bytes=page_bytes, budget_bytes=self.max_bytes
            )
        return self._pools[page_bytes]

    def tidy(self) -> None:
        """After a cell: what torch caches of its ordinary side would be missing for pages."""
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._pools.clear()

    # Sizes ----------------------------------------------------------------------------------------

    def rotation(self, point: Point) -> int:
        """Layers to go round so that none is still in the last-level cache when its turn comes."""
        layer = point.batch * point.length * self.model.token_bytes()
        return max(2, min(self.model.layers, math.ceil(4 * self.cache_bytes / layer)))

    def layers(self, choice: LayoutChoice, point: Point) -> int:
        """Layers that the cell's cache has: whole regions, enough to rotate over."""
        return round_up(self.rotation(point), self.per_region(choice))

    def per_region(self, choice: LayoutChoice) -> int:
        """As a number: None would be the device's default to a cache."""
        return choice.layers_per_region or self.model.layers

    def covered(self, length: int) -> int:
        """Tokens up to which some kernel reads."""
        return max(round_up(length, tile) for tile in self.tiles)

    def layer_bytes(self, point: Point) -> int:
        """K and V of one layer, cover included."""
        return point.batch * self.covered(point.length) * self.model.token_bytes()

    def needed_bytes(self, choice: LayoutChoice, point: Point) -> int:
        """Virtual side and ordinary side together, tails roughly."""
        layers = self.layers(choice, point) + self.rotation(point)
        return int(1.1 * layers * self.layer_bytes(point))

    # Cells ----------------------------------------------------------------------------------------

    def open(self, choice: LayoutChoice, point: Point) -> KVCache:
        model = self.model
        return KVCache(
            self.layers(choice, point),
            model.kv_heads,
            model.head_dim,
            model.dtype,
            max_seqs=point.batch,
            max_tokens=point.length,
            pool=self.pool(choice.page_bytes),
            order=choice.order,
            layers_per_region=self.per_region(choice),
            kv_tile_tokens=self.tiles,
        )

    def queries(self, batch: int, queries: int) -> torch.Tensor:
        model = self.model
        shape = (batch, queries, model.heads, model.head_dim)
        return torch.randn(shape, dtype=model.dtype, device=self.device)

    def measure(self, choice: LayoutChoice, point: Point, kernels: dict[Kernel, Prepare]) -> Cell:
        """What the layout costs in memory and calls, and each kernel's pair of times."""
        rotation = self.rotation(point)
        pool = self.pool(choice.page_bytes)
        if pool.stats().created_bytes + rotation * self.layer_bytes(point) > self.max_bytes:
            pool.trim()  # a larger cell before left pages where the ordinary side has to go
        with self.open(choice, point) as cache:
            slots = np.array([int(cache.open()) for _ in range(point.batch)], dtype=np.int32)
            cell = Cell(self._grow(cache, slots, point.length))
            ours = [cache.layer(layer) for layer in range(rotation)]
            for layer, (k, v) in enumerate(ours):
                fill(cache, layer, [point.length] * point.batch, k, v)
            theirs = [
                (self.ordinary(k, point.length), self.ordinary(v, point.length)) for k, v in ours
            ]
            order = slots.tolist()
            if self.device != "cpu":  # SDPA needs neighbours side by side, the others do not
                self._random.shuffle(order)
            q = self.queries(point.batch, point.queries)
            problem = Problem(q, order, [point.length] * point.batch)
            for kernel, prepare in kernels.items():
                if not fits(kernel, choice):
                    continue
                try:
                    cell.pairs[kernel] = self._pair(prepare, problem, ours, theirs)
                except FAILURES as error:
                    cell.failed[kernel] = f"{type(error).__name__}: {error}"
        return cell

    def growth(self, choice: LayoutChoice, tokens: int) -> Json:
        """Calls and time of one sequence of the whole model growing on pages made for it."""
        model = self.model
        with KVCache(
            model.layers,
            model.kv_heads,
            model.head_dim,
            model.dtype,
            max_seqs=1,
            max_tokens=tokens,
            device=self.device,
            page_bytes=choice.page_bytes,
            order=choice.order,
            layers_per_region=self.per_region(choice),
            kv_tile_tokens=self.tiles,
        ) as cache:
            slots = np.array([int(cache.open())], dtype=np.int32)
            return {"tokens": tokens} | self._grow(cache, slots, tokens)

    def _grow(self, cache: KVCache, slots: np.ndarray[Any, Any], length: int) -> Json:
        calls = cache.pool.driver_calls()
        start = time.perf_counter()
        cache.ensure_many(slots, np.full(len(slots), length, dtype=np.int32))
        seconds = time.perf_counter() - start
        after = cache.pool.driver_calls()
        stats = cache.stats()
        expected = self.expected(cache, [length] * len(slots))
        if (stats.live_bytes, stats.cover_bytes) != (expected.live_bytes, expected.cover_bytes):
            raise AssertionError(f"{stats} is not what the layout says: {expected}")
        return {
            **expected.as_json(),
            "layers": len(cache.specs),
            "ensure_ms": seconds * 1e3,
            "driver_calls": {
                op: after[op] - calls[op] for op in ("create", "map", "set_access", "unmap")
            },
        }

    def expected(self, cache: KVCache, lengths: Sequence[int]) -> Footprint:
        page = cache.pool.page_bytes
        return footprint(cache.layout.regions, page, self.tiles, np.array(lengths))

    def ordinary(self, kv: torch.Tensor, length: int) -> torch.Tensor:
        """K or V in a tensor of its own, in the order that suits the device's kernels best."""
        batch, _, heads, dim = kv.shape
        slot_tokens = self.covered(length)
        if self.device == "cpu":  # SDPA streams each head
            shape = (batch, heads, slot_tokens, dim)
            copy = torch.empty(shape, dtype=kv.dtype, device=kv.device).transpose(1, 2)
        else:
            shape = (batch, slot_tokens, heads, dim)
            copy = torch.empty(shape, dtype=kv.dtype, device=kv.device)
        copy[:, :length] = kv[:, :length]
        copy[:, length:] = 0
        return copy

    def _pair(
        self,
        prepare: Prepare,
        problem: Problem,
        ours: Sequence[tuple[torch.Tensor, torch.Tensor]],
        theirs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> Pairs:
        candidate = [prepare(problem, k, v) for k, v in ours]
        base = [prepare(problem, k, v) for k, v in theirs]
        for a, b in zip(candidate, base, strict=True):
            error = relative_error(a(), b().float())
            if not error < TOLERANCE[self.model.dtype]:
                raise AssertionError(f"virtual and ordinary K and V differ by {error:.2g}")
        n = len(ours)
        pairs = self.time_pair(base, candidate)
        return Pairs(**asdict(pairs) | {k: getattr(pairs, k) / n for k in _PER_LAYER})

    def time_pair(self, base: Sequence[Attend], candidate: Sequence[Attend]) -> Pairs:
        """Times all calls of a side against all of the other, on a GPU as one graph each.

        As many pairs as asked for, fewer if they would take longer than ``kernel_s``.
        """
        clock = self.clock
        base_run, candidate_run = self.runner(base), self.runner(candidate)
        if self.device == "cpu":
            replays, once_s = 1, max(clock(base_run), clock(candidate_run))
        else:
            base_run()  # the first replay uploads the graph
            once_s = clock(base_run)
            replays = max(1, math.ceil(_TIMING_S / once_s))
        affordable = int(self.kernel_s / (2 * replays * once_s))
        found = measure_pairs(
            repeated(base_run, replays),
            repeated(candidate_run, replays),
            pairs=min(self.pairs, max(_FEWEST_PAIRS, affordable)),
            clock=clock,
        )
        return Pairs(**asdict(found) | {k: getattr(found, k) / replays for k in _PER_LAYER})

    @property
    def clock(self) -> Clock:
        """For what :meth:`runner` makes."""
        return wall_clock if self.device == "cpu" else head_start_clock

    def runner(self, calls: Sequence[Attend]) -> Callable[[], object]:
        """All calls of a side: in turn on a CPU, a replay of their graph on a GPU.

        Raises:
            RuntimeError: a call cannot be captured.
        """
        return in_turn(calls) if self.device == "cpu" else capture(calls)

    # Correctness ----------------------------------------------------------------------------------

    def verify(self, choice: LayoutChoice, kernel: Kernel, prepare: Prepare) -> float:
        """Relative error against float32 over ragged slots, NaN wherever no tile reaches.

        Raises:
            AssertionError: beyond the tolerance of the dtype, or NaN.
        """
        lengths = [777, 1, 128, 500, 1024]
        worst = 0.0
        for queries in (1, 4):
            point = Point(max(lengths), len(lengths), queries)
            with self.open(choice, point) as cache:
                slots = [int(cache.open()) for _ in lengths]
                used = [max(length, queries) for length in lengths]
                cache.ensure_many(slots, used)
                self._random.shuffle(slots)
                by_slot = [cache.tokens(slot) for slot in slots]
                layer = len(cache.specs) - 1
                k, v = cache.layer(layer)
                fill(cache, layer, [cache.tokens(s) for s in range(len(slots))], k, v)
                problem = Problem(self.queries(len(slots), queries), slots, by_slot)
                out = prepare(problem, k, v)()
                error = relative_error(out, reference(problem, k, v))
            worst = max(worst, error)
            if not error < TOLERANCE[self.model.dtype]:
                raise AssertionError(
                    f"{kernel.label} on {choice}: relative error {error:.2g}, {queries} queries"
                )
        return worst


_PER_LAYER = ("base_us", "candidate_us")


def fits(kernel: Kernel, choice: LayoutChoice) -> bool:
    """Head order has no flat view."""
    return kernel.form != "flat" or choice.order == "token"
