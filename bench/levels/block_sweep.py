"""The block size of a paged kernel, measured: no level takes one that was not, unless it is given.

Engines with each size that the kernel takes serve the same requests and take turns of decode steps;
the fastest size is the kernel's on this machine, for this model. Of sizes that are as fast but for
a small share the smallest is taken: it wastes least, and shares the most of prefixes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from bench.common import Json, short_count
from bench.levels.engines import EngineSettings, Side, kv_budget, open_sides
from bench.levels.offline.work import fixed_works
from bench.levels.table import Table
from bench.levels.turns import Contender, decode_turns, tokens_for
from bench.model_args import release
from bench.offline_sides import Work
from bench.paged.kernels import BLOCK_SIZES, kinds
from bench.paged.select import choose_paged
from vattn import LLM
from vattn.engine.config import DEFAULT_MAX_NUM_BATCHED_TOKENS
from vattn.hf.model import load_model

WARMUP_TURNS = 2
AS_FAST = 1.02  # times of which nobody can say which is the shorter
# Of a short sweep: most sequences, most tokens of each, and steps of a turn.
_SHORT = {"cpu": (8, 512, 1), "cuda": (16, 2048, 8)}
# Turns that are timed, where sequences may be long; and where they may not, of one step.
_TURNS, _FEW_TURNS = 8, 3


def sides_of(kernel: str, sizes: Sequence[int]) -> list[Side]:
    """A paged side of each block size."""
    return [Side("paged", kernel, size) for size in sizes]


def step_seconds(
    sides: Sequence[Side],
    engines: AbstractContextManager[dict[str, LLM]],
    work: Work,
    *,
    turns: int,
    steps: int,
) -> dict[int, float]:
    """Seconds of a decode step by block size, the median of turns.

    Args:
        sides: as :func:`sides_of` makes them.
        engines: of the sides, by their names.
        work: requests that run all at once; see :func:`.turns.decode_turns`.
        turns: that are timed.
        steps: of a turn.
    """
    with engines as opened:
        contenders = [Contender(str(side), opened[str(side)]) for side in sides]
        decoded = decode_turns(contenders, [work], turns=turns, warmup=WARMUP_TURNS, steps=steps)
    return {
        side.block_tokens: statistics.median(decoded.seconds[str(side)][0]) / steps
        for side in sides
        if side.block_tokens is not None
    }


def block_rows(
    kernel: str, shape: str, batch: int, context: int, seconds: Mapping[int, float]
) -> tuple[int, list[Json]]:
    """The size to take, and a row of results for each that was tried."""
    best = min(size for size, each in seconds.items() if each <= AS_FAST * min(seconds.values()))
    common: Json = {"kernel": kernel, "shape": shape, "batch": batch, "context": context}
    return best, [
        common | {"block_tokens": size, "step_us": each * 1e6, "chosen": size == best}
        for size, each in seconds.items()
    ]


def measured_side(
    side: Side, model: Any, shape: str, *, positions: int, sequences: int
) -> tuple[Side, list[Json]]:
    """A paged side with its kernel and the block size that a short sweep finds fastest here.

    Args:
        side: what is not paged, or has a kernel and a block size already, stays as it is.
        model: a transformers model, whose attention is taken over.
        shape: its name, for the results.
        positions: most tokens of a sequence.
        sequences: that run at once.

    Returns:
        The side, and rows of results; none if nothing had to be measured.

    Raises:
        ValueError: ``positions`` leave no room for a sweep.
        UnsupportedAttention: no paged kernel can serve the model.
    """
    if side.kind != "paged" or (side.kernel and side.block_tokens):
        return side, []
    loaded = load_model(model)
    kernel = side.kernel or choose_paged(loaded.specs, loaded.device).name
    if side.block_tokens is not None:
        return replace(side, kernel=kernel), []
    sizes = kinds()[kernel].block_sizes(loaded.specs[0])
    most, longest, steps = _SHORT[loaded.device.type]
    batch, half = min(most, sequences), min(longest, positions // 2)
    fill, turns = batch * -(-half // DEFAULT_MAX_NUM_BATCHED_TOKENS), _TURNS
    new = tokens_for(fill, turns, WARMUP_TURNS, steps)
    if half + new >= positions:
        turns, steps = _FEW_TURNS, 1
        new = tokens_for(fill, turns, WARMUP_TURNS, steps)
    context = min(half, positions - new - 1)
    if context < 1:
        raise ValueError(
            f"{positions} tokens have no room for the {new} of a sweep of block sizes; ask for "
            f"longer requests, or name a size: paged:{kernel}:{sizes[0]}"
        )
    padded = -(-(context + new) // max(BLOCK_SIZES)) * max(BLOCK_SIZES)
    settings = EngineSettings(
        max_model_len=context + new + 1,
        max_num_seqs=batch,
        # With room for the share that admissions leave free.
        budget_bytes=kv_budget(model, 5 * batch * padded // 4 + 2 * max(BLOCK_SIZES)),
    )
    sides = sides_of(kernel, sizes)
    (work,) = fixed_works(batch, context, new, model.config.vocab_size, 1)
    engines = open_sides(sides, model, settings, cudagraph_capture_sizes=[batch])
    seconds = step_seconds(sides, engines, work, turns=turns, steps=steps)
    release(loaded.device.type)
    best, rows = block_rows(kernel, shape, batch, context, seconds)
    return replace(side, kernel=kernel, block_tokens=best), rows


def blocks_table(rows: Sequence[Json]) -> Table:
    """What the block sizes were chosen by."""
    return Table(
        "block sizes tried: time of a decode step",
        ["paged kernel", "model", "batch", "context", "block", "step us", "chosen"],
        [
            [
                *(r["kernel"], r["shape"], r["batch"], short_count(r["context"])),
                *(r["block_tokens"], r["step_us"], "yes" if r["chosen"] else ""),
            ]
            for r in rows
        ],
    )
