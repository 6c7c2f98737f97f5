"""How decodes over blocks are cut into gathers and calls of dense attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.paged.calls import HostCall
from vattn.attention.base import Int32
from vattn.attention.batching import Int64, Reads, split
from vattn.attention.sdpa_plan import ChunkCall, length_mask

# A cut is kept while all sequences grow in step, for so many steps; as ours is.
_CUT_STEPS = 16


@dataclass(frozen=True)
class Span:
    """A gather: of each sequence of a group the same number of blocks.

    Args:
        blocks: int64 ``[n * blocks per sequence]``, sequence by sequence.
        begin, end: which of a sequence's gathered tokens the call is over.
    """

    blocks: torch.Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class Group:
    """Decodes ``[first, last)`` that share calls, one per span; more than one for one sequence.

    ``mask``, float32 ``[n, 1, 1, end - begin]``, is None if each attends to all of these tokens.
    """

    first: int
    last: int
    spans: list[Span]
    mask: torch.Tensor | None


@dataclass(frozen=True)
class DecodePlan:
    """The decodes of a call for the layers of one kind.

    ``order``, int64 ``[n]``, says which decode is at which place of the groups, and ``back`` where
    each decode is; None if they are in order.
    """

    groups: list[Group]
    order: torch.Tensor | None
    back: torch.Tensor | None


@dataclass(frozen=True)
class Cost:
    """What decides over the cut.

    Args:
        call_tokens: what a call costs beside its tokens, in tokens.
        piece_tokens: to gather at once, so that they are still in the CPU's cache when they are
            read; None for any number.
        may_merge: whether a sequence may be attended to in several calls.
    """

    call_tokens: float
    piece_tokens: int | None
    may_merge: bool


class Cuts:
    """Cuts decodes into groups, remembering the last cut per kind: most steps change nothing."""

    def __init__(self) -> None:
        self._last: dict[object, tuple[Int32, list[tuple[int, int]]]] = {}

    def plan(
        self,
        host: HostCall,
        block_tokens: int,
        window: int | None,
        cost: Cost,
        device: torch.device,
    ) -> DecodePlan:
        """The plan for the decodes of a call.

        They are sorted by length, which costs a gather nothing: groups of nearly equal length waste
        little on padding. Slots of a contiguous cache have to share calls as they lie.
        """
        lens = host.kv_lens
        order = None
        if (np.diff(lens) < 0).any():
            order = np.argsort(lens, kind="stable")
        end = (lens if order is None else lens[order]).astype(np.int64)
        table = blanked(host.table, -(-lens // block_tokens))
        table = table if order is None else table[order]
        begin = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
        groups = [
            _group(first, last, table, begin, end, block_tokens, cost, device)
            for first, last in self._cut(begin, end, window, cost)
        ]
        if order is None:
            return DecodePlan(groups, None, None)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return DecodePlan(groups, *(torch.from_numpy(x).to(device) for x in (order, back)))

    def _cut(
        self, begin: Int64, end: Int64, window: int | None, cost: Cost
    ) -> list[tuple[int, int]]:
        key, lens = (window, cost), end.astype(np.int32)
        last = self._last.get(key)
        if last is not None and len(last[0]) == len(lens):
            grown = lens - last[0]
            if 0 <= grown[0] < _CUT_STEPS and (grown == grown[0]).all():
                return last[1]
        # Sorted sequences are all neighbours of each other.
        rows = np.arange(len(end), dtype=np.int64)
        cut = [
            piece
            for rows_of in split(Reads(rows, begin, end), cost.call_tokens)
            for piece in _pieces(*rows_of, begin, end, cost.piece_tokens)
        ]
        self._last[key] = (lens, cut)
        return cut


def _pieces(
    first: int, last: int, begin: Int64, end: Int64, piece_tokens: int | None
) -> list[tuple[int, int]]:
    """Rows that share a call, cut so that what is gathered for each call stays small."""
    if piece_tokens is None:
        return [(first, last)]
    longest = int((end[first:last] - begin[first:last]).max())
    most = max(1, piece_tokens // longest)
    count = -(-(last - first) // most)
    bounds = [first + (last - first) * i // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _group(
    first: int,
    last: int,
    table: Int32,
    begin: Int64,
    end: Int64,
    block_tokens: int,
    cost: Cost,
    device: torch.device,
) -> Group:
    begins, ends = begin[first:last], end[first:last]
    low, high = int(begins.min()), int(ends.max())
    step = high - low
    if cost.may_merge and cost.piece_tokens is not None and last - first == 1:
        count = max(1, round(step / cost.piece_tokens))
        step = -(-step // count)
        step = -(-step // block_tokens) * block_tokens  # no block is gathered twice
    # Cut where blocks are.
    bounds = [low, *range((low + step) // block_tokens * block_tokens, high, step), high]
    if step >= high - low:
        bounds = [low, high]
    spans = []
    for at, until in itertools.pairwise(bounds):
        block = at // block_tokens
        blocks = table[first:last, block : -(-until // block_tokens)].astype(np.int64)
        spans.append(
            Span(
                torch.from_numpy(blocks.reshape(-1)).to(device),
                at - block * block_tokens,
                until - block * block_tokens,
            )
        )
    mask = None
    if begins.max() > low or ends.min() < high:
        mask = length_mask(begins - low, ends - low, high - low).to(device)
    return Group(first, last, spans, mask)


def blanked(table: Int32, counts: npt.NDArray[np.integer]) -> Int32:
    """The table with block 0 behind each sequence's last block: its zeros are finite, and cached.

    Args:
        table: ``[n, blocks]``.
        counts: ``[n]``, blocks of each sequence.
    """
    out: Int32 = np.where(np.arange(table.shape[1]) < counts[:, None], table, np.int32(0))
    return out


@dataclass(frozen=True)
class Chunks:
    """Chunks of equal shape, and the blocks of what they see.

    ``blocks``: int64, of the tokens from ``begin`` (a whole number of blocks) to the last. Empty if
    nothing came before.
    """

    call: ChunkCall
    blocks: torch.Tensor
    begin: int


def chunk_groups(
    host: HostCall, block_tokens: int, window: int | None, device: torch.device, most_tokens: int
) -> list[Chunks]:
    """Joins chunks of equal shape that follow each other; rows are counted from the call's first.

    Args:
        host: of a call of chunks.
        block_tokens: tokens of a block.
        window: of the layers.
        device: of the cache.
        most_tokens: of K to gather for a call of more than one chunk.
    """
    groups: list[tuple[ChunkCall, int]] = []
    row = 0
    for i, (n, kv) in enumerate(zip(host.query_lens.tolist(), host.kv_lens.tolist(), strict=True)):
        start = kv - n
        if groups:
            last, first = groups[-1]
            room = start == 0 or (window is None and (last.sequences + 1) * kv <= most_tokens)
            if (last.n, last.start) == (n, start) and room:
                joined = ChunkCall(last.row, last.sequences + 1, n, start, 0, neighbours=False)
                groups[-1] = joined, first
                row += n
                continue
        groups.append((ChunkCall(row, 1, n, start, 0, neighbours=False), i))
        row += n
    out = []
    for call, first in groups:
        begin = 0 if window is None else max(0, call.start - window + 1) // block_tokens
        until = -(-(call.start + call.n) // block_tokens)
        blocks = host.table[first : first + call.sequences, begin:until].astype(np.int64)
        out.append(
            Chunks(call, torch.from_numpy(blocks.reshape(-1)).to(device), begin * block_tokens)
        )
    return out
