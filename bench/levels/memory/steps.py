"""Host time of a decode step's memory: block tables kept up to date, against ``ensure_many``.

Both sides do all that a step needs of them, for the same sequences and lengths. Tables persist, as
in a production engine: new blocks are taken and written in place, only what has changed is sent,
and each token's place is looked up for the kernel that writes it. Contiguous slots need only to be
long enough. ``rebuilt`` is the whole table made of lists at each step, as engines did when the
paper was written; it is there to explain its figure, and no side of a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

import vattn
from bench.common import Json, wall_clock
from bench.fake import PUBLISHED_US
from bench.levels.memory.calls import API
from bench.levels.memory.cells import CALLS, calls_of, end_cache, make_cache, on_gpu
from bench.levels.memory.shapes import KVShape, Regions
from bench.levels.repeat import measure_repeated
from bench.paged.sequences import Sequences
from vattn import _core

Int32 = npt.NDArray[np.int32]
WARMUP = 4


class Steps:
    """Sequences that grow by a token at each call."""

    def __init__(self, lengths: Int32, grow: Callable[[Int32], None]) -> None:
        self.lengths = lengths.copy()
        self._grow = grow
        self.steps = 0

    def __call__(self) -> None:
        self.lengths += 1
        self.steps += 1
        self._grow(self.lengths)


def first_lengths(sequences: int, context: int) -> Int32:
    """About ``context`` tokens each, at all places of blocks and pages."""
    random = np.random.default_rng(0)
    return (context - random.integers(0, min(context, 4096) // 2, sequences)).astype(np.int32)


def step_row(
    shape: KVShape,
    regions: Regions,
    sequences: int,
    context: int,
    block_tokens: int,
    pairs: int,
    repeats: int,
    device: str,
) -> Json:
    """One size of a batch: times of a step in turns, and what changed in the tables."""
    lengths = first_lengths(sequences, context)
    found = on_gpu(
        device,
        regions.page_bytes,
        lambda driver: _measure(
            shape, regions, lengths, block_tokens, pairs, repeats, device, driver
        ),
    )
    return {"shape": shape.name, "sequences": sequences, "context": context} | found


def _measure(
    shape: KVShape,
    regions: Regions,
    lengths: Int32,
    block_tokens: int,
    pairs: int,
    repeats: int,
    device: str,
    driver: _core.Driver,
) -> Json:
    steps = pairs * repeats + WARMUP
    paged = _paged(lengths, block_tokens, steps, device)
    cache, ensured = _virtual(shape, regions, lengths, steps, driver)
    tables, pool = paged.sequences.tables, cache.pool
    sent, taken = tables.sent_bytes, paged.sequences.blocks.taken
    made = calls_of(pool)
    found = measure_repeated(
        paged.step, ensured, pairs=pairs, repeats=repeats, warmup=WARMUP
    ).as_json()
    calls = {op: n - made[op] for op, n in calls_of(pool).items()}
    modelled = sum(calls[op] * PUBLISHED_US[API[op]] for op in CALLS if op in API)
    rebuilt = statistics.median(wall_clock(paged.rebuild) for _ in range(9))
    paged.sequences.check()
    end_cache(cache, list(range(len(lengths))))
    return {
        "block_tokens": block_tokens,
        **_compact(found),
        "table_bytes": tables.nbytes,
        "entries_per_step": round((paged.sequences.blocks.taken - taken) / steps, 3),
        "sent_bytes_per_step": round((tables.sent_bytes - sent) / steps, 1),
        "rebuilt_us": round(rebuilt * 1e6, 1),
        "driver_calls_per_step": round(sum(calls.values()) / steps, 3),
        "modelled_driver_us_per_step": round(modelled / steps, 1),
    }


def _compact(ratio: Json) -> Json:
    """To what the machine's clock is good for, without the single repeats."""
    rounded = {k: round(ratio[k], 3) for k in ("ratio", "base_us", "candidate_us")}
    low, high = (round(end(ratio["repeats"]), 3) for end in (min, max))
    return rounded | {"agrees": ratio["agrees"], "repeats_low": low, "repeats_high": high}


class Paged:
    """A paged cache's side of a step, without K and V."""

    def __init__(self, sequences: Sequences, lengths: Int32) -> None:
        self.sequences = sequences
        self.slots = np.array([sequences.open() for _ in lengths], dtype=np.int32)
        sequences.ensure(self.slots, lengths)
        self.step = Steps(lengths, self._grow)

    def _grow(self, lengths: Int32) -> None:
        self.sequences.ensure(self.slots, lengths)
        self.sequences.locate(self.slots, lengths - 1)

    def rebuild(self) -> torch.Tensor:
        """The batch's table from lists of blocks, on the device."""
        rows = [self.sequences.blocks_of(slot) for slot in self.slots.tolist()]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return torch.from_numpy(table).to(self.sequences.tables.device.device)


def _paged(lengths: Int32, block_tokens: int, steps: int, device: str) -> Paged:
    sequences = Sequences(
        max_seqs=len(lengths),
        max_tokens=int(lengths.max()) + steps,
        num_blocks=int((-(-(lengths + steps) // block_tokens)).sum()) + 1,
        block_tokens=block_tokens,
        device=torch.device(device),
    )
    return Paged(sequences, lengths)


def _virtual(
    shape: KVShape, regions: Regions, lengths: Int32, steps: int, driver: _core.Driver
) -> tuple[vattn.KVCache, Steps]:
    longest = int(lengths.max()) + steps
    runs = len(shape.specs(apart=regions.apart)) * 2 * shape.kv_heads
    tile = max(regions.tiles("cuda"))
    each = (longest + tile) * shape.token_bytes + runs * regions.page_bytes
    pool = vattn.PagePool(
        "cuda", driver=driver, page_bytes=regions.page_bytes, budget_bytes=len(lengths) * each
    )
    cache = make_cache(pool, shape, regions, len(lengths), longest)
    slots = np.array([int(cache.open()) for _ in lengths], dtype=np.int32)
    cache.ensure_many(slots, lengths)
    return cache, Steps(lengths, lambda now: cache.ensure_many(slots, now))
