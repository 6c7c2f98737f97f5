"""One cell of the layout benchmark: a kernel on virtual slots against ordinary tensors."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from bench.common import Json, Pairs, measure_pairs, wall_clock
from bench.device import device_clock, last_level_cache_bytes
from bench.kernels import Kernel, Prepare
from bench.problem import Attend, Problem, reference
from bench.waste import Footprint, footprint
from vattn import KVCache, PagePool
from vattn.kv.layout import round_up

cuda: Any = torch.cuda  # parts of it are untyped

# ||out - reference|| / ||reference||: above what the arithmetic of the dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Model:
    """The attention layers of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def as_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class LayoutChoice:
    """What is compared. ``layers_per_region`` None is all."""

    order: Literal["token", "head"]
    layers_per_region: int | None
    page_bytes: int


@dataclass(frozen=True)
class Point:
    """What is attended to: ``batch`` sequences of ``length`` tokens, ``queries`` of them new."""

    length: int
    batch: int
    queries: int


class Bench:
    """A device, a model and tile sizes; cells are measured on them one after the other."""

    def __init__(
        self, device: str, model: Model, tiles: Sequence[int], pairs: int, max_bytes: int
    ) -> None:
        self.device = device
        self.model = model
        self.tiles = tuple(tiles)
        self.pairs = pairs
        self.max_bytes = max_bytes
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

    def close(self) -> None:
        self._pools.clear()

    # Sizes ----------------------------------------------------------------------------------------

    def rotation(self, point: Point) -> int:
        """Layers to go round so that none is still in the last-level cache when its turn comes."""
        layer = point.batch * point.length * self.model.token_bytes()
        return max(2, min(self.model.layers, math.ceil(4 * self.cache_bytes / layer)))

    def layers(self, choice: LayoutChoice, point: Point) -> int:
        """Layers that the cell's cache has: whole regions, enough to rotate over."""
        per_region = choice.layers_per_region or self.model.layers
        return round_up(self.rotation(point), per_region)

    def needed_bytes(self, choice: LayoutChoice, point: Point) -> int:
        """Virtual side and ordinary side together, tails and cover included roughly."""
        tokens = point.batch * round_up(point.length, max(self.tiles))
        layers = self.layers(choice, point) + self.rotation(point)
        return int(1.1 * layers * tokens * self.model.token_bytes())

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
            layers_per_region=choice.layers_per_region,
            kv_tile_tokens=self.tiles,
        )

    def queries(self, batch: int, queries: int) -> torch.Tensor:
        model = self.model
        shape = (batch, queries, model.heads, model.head_dim)
        return torch.randn(shape, dtype=model.dtype, device=self.device)

    def measure(
        self, choice: LayoutChoice, point: Point, kernels: dict[Kernel, Prepare]
    ) -> tuple[Json, dict[Kernel, Pairs]]:
        """What the layout costs in memory and calls, and each kernel's pair of times."""
        rotation = self.rotation(point)
        with self.open(choice, point) as cache:
            slots = np.array([int(cache.open()) for _ in range(point.batch)], dtype=np.int32)
            memory = self._grow(cache, slots, point.length)
            ours = [cache.layer(layer) for layer in range(rotation)]
            for layer, (k, v) in enumerate(ours):
                fill(cache, layer, [point.length] * point.batch, k, v)
            theirs = [
                (self._ordinary(k, point.length), self._ordinary(v, point.length)) for k, v in ours
            ]
            order = slots.tolist()
            if self.device != "cpu":  # SDPA needs neighbours side by side, the others do not
                self._random.shuffle(order)
            q = self.queries(point.batch, point.queries)
            lengths = [point.length] * point.batch
            problem = Problem(q, order, lengths)
            pairs = {
                kernel: self._pair(prepare, problem, ours, theirs)
                for kernel, prepare in kernels.items()
                if fits(kernel, choice)
            }
        return memory, pairs

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
            layers_per_region=choice.layers_per_region,
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

    def _ordinary(self, kv: torch.Tensor, length: int) -> torch.Tensor:
        """K or V in a tensor of its own, in the order that suits the device's kernels best."""
        batch, _, heads, dim = kv.shape
        slot_tokens = round_up(length, max(self.tiles))
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
        ours_run, theirs_run = self._runner(candidate), self._runner(base)
        clock = wall_clock if self.device == "cpu" else device_clock
        pairs = measure_pairs(theirs_run, ours_run, pairs=self.pairs, clock=clock)
        n = len(ours)
        return Pairs(**asdict(pairs) | {k: getattr(pairs, k) / n for k in _PER_LAYER})

    def _runner(self, calls: Sequence[Attend]) -> Callable[[], object]:
        """Runs a call per layer; on a GPU as one graph, so that launches cost nothing."""

        def run() -> None:
            for call in calls:
                call()

        if self.device == "cpu":
            return run
        run()
        torch.cuda.synchronize()
        graph, stream = cuda.CUDAGraph(), cuda.Stream()
        with cuda.stream(stream):  # not `with cuda.graph(...)`: that collects garbage each time
            graph.capture_begin()
            run()
            graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay  # type: ignore[no-any-return]

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


def fill(
    cache: KVCache, layer: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
) -> None:
    """Random tokens, finite garbage up to the end of the last tile, NaN where nobody may read."""
    region = cache.layout.regions[cache.layout.places[layer][0]]
    page = cache.pool.page_bytes
    for x in (k, v):
        for slot, length in enumerate(lengths):
            cover = max(round_up(length, tile) for tile in cache.layout.tiles)
            mapped = round_up(cover * region.token_bytes, page) // region.token_bytes
            x[slot, :cover].normal_()
            x[slot, cover:mapped] = float("nan")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (out.float() - expected).norm() / expected.norm()
    return float(difference)
