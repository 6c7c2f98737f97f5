"""A KVCache with every request of a trace in it: what it wastes, and how often it calls the driver.

On a CPU the pages are those of the real CUDA driver code on the fake libcuda, with nothing behind
them, so the full size fits anywhere; on a GPU they are real. ``host`` pages are real memory on any
machine, zeroed when they are created, so there a cell has the layers of one region (one layer in
head order) instead of all: every region is laid out alike, so shares are those of the full model.
What does not fit, or has pages that the driver cannot make, is computed by the formula that all the
others are checked against.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

import vattn
from bench.common import Json
from bench.device import free_bytes
from bench.fake import fake_gpu, open_fake_driver
from bench.levels.memory.shapes import KVShape, Regions
from bench.trace import Trace
from bench.waste import Footprint, footprint
from vattn import _core

CALLS = ("create", "map", "set_access", "unmap", "destroy")
GRANULARITY = 2 << 20  # of every CUDA driver so far; smaller pages need a patched one
Calls = dict[str, int]
Found = TypeVar("Found")


def on_gpu(device: str, page_bytes: int, work: Callable[[_core.Driver], Found]) -> Found:
    """Calls ``work`` with the CUDA driver: the real one, or on a CPU that on the fake.

    The fake has the granularity that a patched driver would need for smaller pages.

    Raises:
        FileNotFoundError: the fake is not built; the message has the command.
        Left: pages or addresses are left on the fake.
    """
    if device == "cuda":
        found = work(_core.cuda_driver(device=torch.cuda.current_device()))
        gc.collect()  # its memory is needed by whoever comes next
        return found
    with fake_gpu(granularity=min(page_bytes, GRANULARITY)):
        found = work(open_fake_driver())
        gc.collect()
    return found


def fits(device: str, page_bytes: int, total_bytes: int) -> bool:
    """Whether a cell can be measured: a GPU has its granularity and its memory."""
    if device == "cpu":
        return True
    return page_bytes % GRANULARITY == 0 and total_bytes < free_bytes("cuda")


class Sequences:
    """A cache with every sequence of a trace in it."""

    def __init__(
        self, pool: vattn.PagePool, shape: KVShape, regions: Regions, layers: int, trace: Trace
    ) -> None:
        self.pool = pool
        self.trace = trace
        self.cache = make_cache(
            pool, shape, regions, len(trace), int(trace.total.max()), layers=layers
        )
        self._made = calls_of(pool)

    def _since(self) -> Calls:
        """Driver calls since this was asked last."""
        before, self._made = self._made, calls_of(self.pool)
        return {op: self._made[op] - before[op] for op in CALLS}

    def admit(self) -> Calls:
        for tokens in self.trace.context.tolist():
            self.cache.ensure(self.cache.open(expected_tokens=tokens), tokens)
        return self._since()

    def decode(self) -> Calls:
        """One token a step for whoever is not at its end."""
        lengths, ends = self.trace.context.copy(), self.trace.total
        while len(running := np.flatnonzero(lengths < ends)):
            lengths[running] += 1
            self.cache.ensure_many(running.astype(np.int32), lengths[running].astype(np.int32))
        return self._since()

    def end(self) -> Calls:
        """Releases everything and gives it back.

        Raises:
            AssertionError: pages are left.
        """
        end_cache(self.cache, range(len(self.trace)))
        return self._since()


def make_cache(
    pool: vattn.PagePool,
    shape: KVShape,
    regions: Regions,
    max_seqs: int,
    max_tokens: int,
    *,
    layers: int | None = None,
    reuse_stale: bool = True,
) -> vattn.KVCache:
    """A cache in the pool, of all or some of the model's layers."""
    specs = shape.specs(apart=regions.apart)
    return vattn.KVCache(
        specs if layers is None else specs[:layers],
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        pool=pool,
        order=regions.order,
        layers_per_region=regions.layers_per_region or len(specs),
        kv_tile_tokens=regions.tiles(pool.device.type),
        reuse_stale=reuse_stale,
    )


def calls_of(pool: vattn.PagePool) -> Calls:
    """Driver calls so far, of those that cost."""
    calls = pool.driver_calls()
    return {op: calls[op] for op in CALLS}


def end_cache(cache: vattn.KVCache, slots: range | list[int]) -> None:
    """Releases the slots, gives all memory back, and proves that.

    Raises:
        AssertionError: pages are left.
    """
    for slot in slots:
        cache.release(slot)
    cache.check()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a released page goes back once what used it is done
    cache.trim()
    cache.check()
    left = cache.pool.stats()
    assert (left.created_bytes, left.used_bytes) == (0, 0), left
    cache.close()


@dataclass(frozen=True)
class Cell:
    """A layout of a shape on one driver."""

    driver: str  # "cuda", on a CPU on the fake, or "host"
    regions: Regions
    default: bool = False  # what a user gets who asks for nothing

    @property
    def device(self) -> str:
        return "cuda" if self.driver == "cuda" else "cpu"


def measure(
    cell: Cell, shape: KVShape, layers: int, trace: Trace, driver: _core.Driver
) -> tuple[Footprint, dict[str, Calls]]:
    """Fills a cache with ``layers`` specs of the shape, and checks the formula against it.

    Returns:
        The bytes, and driver calls of ``admission``, ``decode`` and ``end``.

    Raises:
        AssertionError: the formula is wrong, or pages are left.
    """
    regions = cell.regions
    expected = compute(cell, shape, trace, layers)
    pool = vattn.PagePool(
        cell.device,
        driver=driver,
        page_bytes=regions.page_bytes,
        budget_bytes=expected.live_bytes + expected.cover_bytes + 64 * regions.page_bytes,
    )
    sequences = Sequences(pool, shape, regions, layers, trace)
    calls = {"admission": sequences.admit(), "decode": sequences.decode()}
    stats = sequences.cache.stats()
    found = (stats.token_bytes, stats.live_bytes, stats.cover_bytes)
    assert found == (expected.token_bytes, expected.live_bytes, expected.cover_bytes), found
    sequences.cache.check()
    return expected, calls | {"end": sequences.end()}


def compute(cell: Cell, shape: KVShape, trace: Trace, layers: int | None = None) -> Footprint:
    """What :func:`measure` would find of bytes."""
    layout = cell.regions.layout(shape, int(trace.total.max()), cell.device, layers)
    return footprint(layout.regions, layout.page_bytes, layout.tiles, trace.total)


def waste_row(cell: Cell, shape: KVShape, trace: Trace, device: str, host_bytes: int) -> Json:
    """Measures a cell in full, measures one of its regions, or computes it."""
    if cell.driver == "cuda":
        whole = compute(cell, shape, trace)
        layers = len(shape.specs(apart=cell.regions.apart))
        if not fits(device, cell.regions.page_bytes, whole.live_bytes + whole.cover_bytes):
            return _row(cell, shape, trace, whole, None, 0)
        found, calls = on_gpu(
            device,
            cell.regions.page_bytes,
            lambda driver: measure(cell, shape, layers, trace, driver),
        )
        return _row(cell, shape, trace, found, calls, layers)
    one = 1 if cell.regions.order == "head" else cell.regions.layers_per_region or shape.layers
    part = compute(cell, shape, trace, one)
    if part.live_bytes + part.cover_bytes > host_bytes:
        return _row(cell, shape, trace, part, None, 0)
    driver = _core.host_driver()
    before = driver.physical_bytes()
    found, calls = measure(cell, shape, one, trace, driver)
    gc.collect()
    assert driver.physical_bytes() == before, "host pages are left"
    return _row(cell, shape, trace, found, calls, one)


def _row(
    cell: Cell,
    shape: KVShape,
    trace: Trace,
    bytes_: Footprint,
    calls: dict[str, Calls] | None,
    layers: int,
) -> Json:
    """Compact: shares, and calls per admission and per 1000 tokens, of the whole model."""
    row: Json = {"shape": shape.name, "driver": cell.driver} | cell.regions.as_json()
    scale = shape.token_bytes * int(trace.total.sum()) / bytes_.token_bytes
    row |= {
        "live_share": round(bytes_.live_share, 4),
        "cover_share": round(bytes_.cover_share, 4),
        "tail_bytes_per_request": round(scale * bytes_.tail_bytes / len(trace)),
        "measured_layers": layers,
    }
    if cell.default:
        row["default"] = True
    if calls is not None:
        tokens = max(1, int(trace.generated.sum()))
        admitted, decoded = calls["admission"], calls["decode"]
        mapped = decoded["map"] + decoded["set_access"]
        row["map_per_admission"] = round(scale * admitted["map"] / len(trace), 1)
        row["access_per_admission"] = round(scale * admitted["set_access"] / len(trace), 1)
        row["calls_per_1000_tokens"] = round(1000 * scale * mapped / tokens, 1)
    return row


def elsewhere(cell: Cell, shape: KVShape, whole: Trace, sequences: int) -> Json:
    """The live share of all requests of a trace, and of every stretch of so many of them."""
    shares = [
        compute(cell, shape, whole.part(start, sequences)).live_share
        for start in range(0, len(whole) - sequences + 1, sequences)
    ]
    return {
        "live_share_of_all": round(compute(cell, shape, whole).live_share, 4),
        "live_share_low": round(min(shares), 4),
        "live_share_high": round(max(shares), 4),
        "stretches": len(shares),
    }
