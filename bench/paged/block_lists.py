"""Block tables as packed lists, as FlashInfer wants them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bench.paged.calls import PagedCall
from vattn.attention.base import Int32
from vattn.attention.upload import Uploader


class BlockLists(NamedTuple):
    """A call's table as lists: what a wrapper reads on the host is there, pinned, the rest is not.

    Args:
        starts: int32 ``[n + 1]`` on the host, of each sequence's blocks.
        blocks: int32 ``[starts[-1]]`` on the device.
        last: int32 ``[n]`` on the host, tokens in each last block.
        query_starts: int32 ``[n + 1]`` on the host.
    """

    starts: torch.Tensor
    blocks: torch.Tensor
    last: torch.Tensor
    query_starts: torch.Tensor


def block_lists(call: PagedCall, upload: Uploader) -> BlockLists:
    """The blocks of a call without the gaps of its table, picked on the device.

    One transfer of two numbers per sequence; the host waits for nothing.
    """
    host, table = call.on_host(), call.table
    counts = -(-host.kv_lens.astype(np.int64) // call.block_tokens)
    starts = _starts(counts)
    # A sequence's blocks lie together in the table: each list's place and its row's differ by this.
    shifts = np.arange(len(counts)) * table.stride(0) - starts[:-1]
    counts_, shifts_ = upload(counts, shifts)
    total = int(starts[-1])
    places = torch.repeat_interleave(shifts_, counts_, output_size=total)
    places += torch.arange(total, device=places.device)
    flat = table.as_strided(((len(counts) - 1) * table.stride(0) + table.shape[1],), (1,))
    last = (host.kv_lens - (counts - 1) * call.block_tokens).astype(np.int32)
    return BlockLists(
        starts=_pinned(starts, table.device),
        blocks=flat.index_select(0, places),
        last=_pinned(last, table.device),
        query_starts=_pinned(_starts(host.query_lens), table.device),
    )


def _starts(counts: npt.NDArray[np.integer[Any]]) -> Int32:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _pinned(array: Int32, device: torch.device) -> torch.Tensor:
    """On the host; torch does not give its memory to others before copies from it are done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
