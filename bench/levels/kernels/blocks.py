"""The paged side of a comparison of kernels: the same K and V as in slots, spread over blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.paged.calls import make_call
from bench.paged.kernels import PagedKernel
from bench.problem import Attend, Problem
from vattn.attention.base import AttentionSpec

KV = tuple[torch.Tensor, torch.Tensor]
# Calls of one problem, one for each layer's K and V. What layers share is prepared once.
PrepareLayers = Callable[[Problem, Sequence[KV]], list[Attend]]
Table = npt.NDArray[np.int32]

SHUFFLED, CONSECUTIVE = "shuffled", "consecutive"
PLACEMENTS = (SHUFFLED, CONSECUTIVE)


def spec_of(problem: Problem, kv_heads: int) -> AttentionSpec:
    """Full attention of the problem's queries."""
    _, _, heads, dim = problem.q.shape
    return AttentionSpec(heads, kv_heads, dim, problem.q.dtype, problem.scale)


def on_blocks(kernel: PagedKernel, table: Table, block_tokens: int) -> PrepareLayers:
    """A paged kernel over sequences whose blocks the table names; planned once for all layers.

    Args:
        kernel: which nobody else plans while these calls are in use.
        table: int32 ``[n, blocks]``.
        block_tokens: tokens of a block.
    """

    def of_layers(problem: Problem, layers: Sequence[KV]) -> list[Attend]:
        kernel.check_block(block_tokens)
        by_head = kernel.order == "head"
        spec = spec_of(problem, layers[0][0].shape[0 if by_head else 2])
        queries = [problem.queries] * problem.batch
        call = make_call(table, list(problem.lengths), queries, block_tokens, problem.q.device)
        kernel.plan(call, [spec])
        packed = problem.q.flatten(0, 1)

        def attend(k: torch.Tensor, v: torch.Tensor) -> Attend:
            return lambda: kernel.attend(call, spec, packed, k, v).view(problem.q.shape)

        return [attend(k, v) for k, v in layers]

    return of_layers


def block_counts(lengths: Sequence[int], block_tokens: int) -> list[int]:
    """Blocks of each sequence."""
    return [-(-length // block_tokens) for length in lengths]


def place_blocks(
    lengths: Sequence[int], block_tokens: int, placement: str, spare: int = 0, seed: int = 0
) -> Table:
    """A block table: shuffled as after hours of serving, or consecutive as right after the start.

    Block 0 belongs to nobody, as in an engine; entries behind a sequence's last block name it.

    Args:
        lengths: tokens of each sequence.
        block_tokens: tokens of a block.
        placement: of PLACEMENTS.
        spare: blocks of the pool that no sequence has; scattered among the others if shuffled.
        seed: of the shuffling.

    Returns:
        int32 ``[n, blocks of the longest]``.
    """
    counts = block_counts(lengths, block_tokens)
    ids = np.arange(1, 1 + sum(counts) + spare, dtype=np.int32)
    if placement == SHUFFLED:
        np.random.default_rng(seed).shuffle(ids)
    table = np.zeros((len(lengths), max(counts)), np.int32)
    first = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = ids[first : first + count]
        first += count
    return table


@dataclass(frozen=True)
class Blocks:
    """K and V of some layers in blocks, all by the same table."""

    table: Table
    block_tokens: int
    layers: list[KV]


def make_blocks(
    kernel: PagedKernel,
    block_tokens: int,
    problem: Problem,
    sources: Sequence[KV],
    *,
    placement: str,
    spare: int = 0,
    unread: float = 0.0,
) -> Blocks:
    """Copies slots into blocks.

    Args:
        kernel: that is to read them, in its order.
        block_tokens: tokens of a block.
        problem: which slots hold how much.
        sources: K and V of each layer, ``[slots, slot_tokens, kv_heads, head_dim]``.
        placement: of PLACEMENTS.
        spare: blocks that no sequence has.
        unread: what stands in these.
    """
    table = place_blocks(problem.lengths, block_tokens, placement, spare)
    total = 1 + sum(block_counts(problem.lengths, block_tokens)) + spare
    spec = spec_of(problem, sources[0][0].shape[2])
    free = np.setdiff1d(np.arange(1, total), table)
    layers = []
    for source in sources:
        pair = kernel.empty(spec, total, block_tokens, problem.q.device)
        for pool, kv in zip(pair, source, strict=True):
            blocks = pool.permute(1, 2, 0, 3) if kernel.order == "head" else pool
            if spare:
                blocks[torch.from_numpy(free).to(pool.device)] = unread
            for row, slot, length in zip(table, problem.slots, problem.lengths, strict=True):
                _fill(blocks, row, block_tokens, kv[slot, :length])
        layers.append(pair)
    return Blocks(table, block_tokens, layers)


def _fill(blocks: torch.Tensor, row: Table, block_tokens: int, tokens: torch.Tensor) -> None:
    """One sequence into its blocks ``[num_blocks, block_tokens, kv_heads, head_dim]``."""
    whole, tail = divmod(len(tokens), block_tokens)
    ids = torch.from_numpy(row.astype(np.int64)).to(blocks.device)
    if whole:
        full = tokens[: whole * block_tokens]
        blocks[ids[:whole]] = full.view(whole, block_tokens, *full.shape[1:])
    if tail:
        blocks[ids[whole], :tail] = tokens[whole * block_tokens :]
