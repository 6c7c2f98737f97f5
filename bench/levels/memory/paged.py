"""What blocks of a paged cache waste, how many requests they hold, and what their tables take.

Measured by the sequences and tables of ``bench.paged``, which need no K and V for that.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.common import Json
from bench.levels.memory.batch import beginning_at, spread_row, starts, until_full
from bench.levels.memory.shapes import KVShape
from bench.paged.blocks import OutOfBlocks
from bench.paged.sequences import Sequences
from bench.trace import Lengths, Trace

ENTRY_BYTES = 4  # of a block table


def blocks_each(lengths: Lengths, block_tokens: int) -> Lengths:
    """Blocks of each sequence."""
    return -(-lengths // block_tokens)


def waste_row(shape: KVShape, block_tokens: int, trace: Trace, max_tokens: int) -> Json:
    """All requests at once, each at its full length.

    Raises:
        AssertionError: the formula is wrong.
    """
    lengths = trace.total
    needed = blocks_each(lengths, block_tokens)
    paged = Sequences(
        max_seqs=len(trace),
        max_tokens=max_tokens,
        num_blocks=int(needed.sum()) + 1,
        block_tokens=block_tokens,
        device=torch.device("cpu"),
    )
    slots = [paged.open() for _ in range(len(trace))]
    for slot, tokens in zip(slots, trace.context.tolist(), strict=True):
        paged.ensure([slot], [tokens])
    prompts_bytes, prompts_sent = paged.tables.sent_bytes, paged.tables.transfers
    paged.ensure(slots, lengths.astype(np.int32))
    paged.check()
    assert paged.blocks.live == int(needed.sum()), (paged.blocks.live, int(needed.sum()))
    live = paged.blocks.live * block_tokens * shape.token_bytes
    tokens = int(lengths.sum()) * shape.token_bytes
    return {
        "shape": shape.name,
        "layout": "blocks",
        "block_tokens": block_tokens,
        "live_share": round(tokens / live, 4),
        "cover_share": 0.0,  # kernels of blocks read no further than the last one
        "tail_bytes_per_request": round((live - tokens) / len(trace)),
        "table_bytes": paged.tables.nbytes,
        "table_bytes_per_admission": round(prompts_bytes / prompts_sent),
    }


def most_in_blocks(
    shape: KVShape,
    block_tokens: int,
    trace: Trace,
    budget_bytes: int,
    max_tokens: int,
    stretches: int,
) -> Json:
    """Requests in a paged cache of that budget, one block of which is set apart for padding.

    Raises:
        AssertionError: the manager and the formula disagree.
    """
    num_blocks = budget_bytes // (block_tokens * shape.token_bytes)
    needs = blocks_each(trace.total, block_tokens)
    counts = [
        until_full(beginning_at(needs, s), num_blocks - 1) for s in starts(len(trace), stretches)
    ]
    found = _admit(trace, block_tokens, num_blocks, max_tokens)
    assert found == counts[0], f"{shape.name}, blocks of {block_tokens}: {found}, {counts[0]}"
    row = {"shape": shape.name, "how": "measured", "layout": "blocks", "block_tokens": block_tokens}
    return row | spread_row(counts)


def _admit(trace: Trace, block_tokens: int, num_blocks: int, max_tokens: int) -> int:
    most = until_full(trace.total, num_blocks * block_tokens) + 1
    paged = Sequences(
        max_seqs=most,
        max_tokens=max_tokens,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        device=torch.device("cpu"),
    )
    admitted = 0
    for tokens in trace.total.tolist():
        slot = paged.open()
        try:
            paged.ensure([slot], [tokens])
        except OutOfBlocks:
            break
        admitted += 1
    paged.check()
    return admitted
