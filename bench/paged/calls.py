"""What a paged kernel is told about the sequences of one call.

As in ``vattn.attention.flash_calls`` a step makes two calls, decodes and chunks; here each sequence
comes with the blocks that hold its tokens, a row of the block table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.base import Int32
from vattn.attention.upload import Uploader


@dataclass(frozen=True)
class HostCall:
    """The same on the host, for kernels that plan there.

    Args:
        make_table: gathers :attr:`table`, which not every kernel wants there.
        query_lens: int32 ``[n]``.
        kv_lens: int32 ``[n]``.
    """

    make_table: Callable[[], Int32]
    query_lens: Int32
    kv_lens: Int32

    @functools.cached_property
    def table(self) -> Int32:
        """Int32 ``[n, blocks]``; entries behind a sequence's last block name any block."""
        return self.make_table()


@dataclass(frozen=True)
class PagedCall:
    """The sequences of one kernel call, as int32 tensors on the device.

    Args:
        rows: of the packed batch.
        decodes: one query each.
        block_tokens: tokens of a block.
        table: ``[n, blocks]``, a sequence's blocks in order; wide enough for the longest and no
            wider, because kernels take the width for the longest length when they choose how to
            split the work. The last stride is 1.
        kv_lens: ``[n]``, tokens of each sequence, the new ones included.
        past_lens: ``[n]``, tokens before the new ones.
        query_starts: ``[n + 1]``, where each sequence's queries begin in ``rows``.
        longest_query, longest_kv: of the sequences.
        host: what a kernel that plans on the host needs; None in a recorded graph.
        plan: what a kernel's ``plan`` leaves for its ``attend``.
    """

    rows: slice
    decodes: bool
    block_tokens: int
    table: torch.Tensor
    kv_lens: torch.Tensor
    past_lens: torch.Tensor
    query_starts: torch.Tensor
    longest_query: int
    longest_kv: int
    host: HostCall | None = None
    plan: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.kv_lens)

    def on_host(self) -> HostCall:
        """What is known on the host.

        Raises:
            ValueError: nothing is, in a recorded graph.
        """
        if self.host is None:
            raise ValueError("this kernel plans on the host; it cannot be part of a recorded graph")
        return self.host


def make_call(
    table: npt.NDArray[np.integer[Any]],
    kv_lens: Sequence[int] | Int32,
    query_lens: Sequence[int] | Int32,
    block_tokens: int,
    device: torch.device | str,
    *,
    first_row: int = 0,
) -> PagedCall:
    """A call over sequences given by their blocks, in one transfer.

    Args:
        table: ``[n, at least blocks]``: the blocks of each sequence in order. What is behind the
            last block of the longest sequence is left out.
        kv_lens: ``[n]``, tokens of each, the queries' own included.
        query_lens: ``[n]``, of each the last tokens. All 1 makes it a call of decodes.
        block_tokens: tokens of a block.
        device: of the kernel.
        first_row: of the packed batch.

    Raises:
        ValueError: lengths that do not fit each other or the table.
    """
    kv, queries = (np.ascontiguousarray(x, np.int32) for x in (kv_lens, query_lens))
    if not len(table) == len(kv) == len(queries) > 0:
        raise ValueError(
            f"{len(table)} rows of the table, {len(kv)} kv_lens and {len(queries)} query_lens; "
            "give one of each per sequence, and at least one sequence"
        )
    if queries.min() < 1 or (queries > kv).any():
        raise ValueError(
            f"query_lens={queries.tolist()} have to be between 1 and kv_lens={kv.tolist()}"
        )
    blocks = -(-int(kv.max()) // block_tokens)
    if table.shape[1] < blocks:
        raise ValueError(
            f"{kv.max()} tokens need {blocks} blocks of {block_tokens}, and the table has "
            f"{table.shape[1]} columns"
        )
    rows = np.ascontiguousarray(table[:, :blocks], np.int32)
    starts = np.zeros(len(kv) + 1, np.int32)
    np.cumsum(queries, out=starts[1:])
    on_device = Uploader(device)(rows, kv, kv - queries, starts)
    return PagedCall(
        rows=slice(first_row, first_row + int(starts[-1])),
        decodes=int(queries.max()) == 1,
        block_tokens=block_tokens,
        table=on_device[0],
        kv_lens=on_device[1],
        past_lens=on_device[2],
        query_starts=on_device[3],
        longest_query=int(queries.max()),
        longest_kv=int(kv.max()),
        host=HostCall(lambda: rows, queries, kv),
    )
