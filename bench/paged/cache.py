"""K and V in blocks: ordinary preallocated memory, found through block tables.

A block has the K and V of ``block_tokens`` tokens in every layer, so that one table serves all
layers, as vLLM does for models whose layers are alike. A layer with a window keeps what lies behind
it: the attention masks it.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
import torch

from bench.paged.sequences import Sequences
from vattn.attention.upload import Uploader
from vattn.config import format_bytes
from vattn.kv.layout import LayerSpec, Layout, Order
from vattn.kv.report import CacheStats

# Copies move bits, whatever they stand for; not every operator knows the 8-bit floats.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PagedCache(Sequences):
    """Blocks of the layers' K and V, and the sequences that have them.

    Nothing in it is ever NaN by accident: memory begins as zeros, and whoever wrote something that
    is no number has it zeroed before others get the block.

    Args:
        specs: of the layers.
        device: of the tensors.
        max_seqs: number of slots.
        max_tokens: longest sequence.
        num_blocks: with the null block, whose number is 0.
        block_tokens: tokens of a block.
        order: "token" for ``[block, token, head]``, what all kernels here want, or "head" for
            ``[head, block, token]``, for kernels that stay with one head; gathering on a CPU is
            slower in it.

    Raises:
        ValueError: a size that is not positive, no layers, or an order that does not exist.
        torch.OutOfMemoryError: it does not fit (on a CPU, a RuntimeError of torch).
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        *,
        device: torch.device | str,
        max_seqs: int,
        max_tokens: int,
        num_blocks: int,
        block_tokens: int,
        order: Order = "token",
    ) -> None:
        if not specs:
            raise ValueError("a cache needs at least one layer")
        if order not in typing.get_args(Order):
            raise ValueError(f'order={order!r} must be "token" or "head"')
        self.specs: Sequence[LayerSpec] = list(specs)
        self.device = torch.device(device)
        super().__init__(
            max_seqs=max_seqs,
            max_tokens=max_tokens,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            device=self.device,
        )
        self.order: Order = order
        self.token_bytes = sum(spec.token_bytes for spec in self.specs)
        self.block_bytes = self.token_bytes * self.block_tokens
        self.layout = Layout((), (), self.max_seqs, self.max_tokens, (1,), self.block_bytes)
        self.copied_bytes = 0
        self._upload = Uploader(self.device)
        self._block_dim = 2 if order == "token" else 3
        self._make_tensors()

    def _make_tensors(self) -> None:
        groups: dict[tuple[int, int, torch.dtype], list[int]] = {}
        for layer, spec in enumerate(self.specs):
            groups.setdefault((spec.kv_heads, spec.head_dim, spec.dtype), []).append(layer)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._bits: list[torch.Tensor] = []  # of each group of equal layers
        for (heads, dim, dtype), layers in groups.items():
            shape = [self.num_blocks, self.block_tokens]
            shape = [*shape, heads] if self.order == "token" else [heads, *shape]
            with torch.inference_mode(False):
                kv = torch.zeros(len(layers), 2, *shape, dim, dtype=dtype, device=self.device)
            self._layers |= {layer: (kv[i, 0], kv[i, 1]) for i, layer in enumerate(layers)}
            self._bits.append(kv.view(_BITS[dtype.itemsize]))

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, of all blocks; the memory itself.

        Returns:
            Each ``[num_blocks, block_tokens, kv_heads, head_dim]``, or in head order ``[kv_heads,
            num_blocks, block_tokens, head_dim]``; contiguous.

        Raises:
            ValueError: there is no such layer, or the cache is closed.
        """
        if index not in self._layers:
            raise ValueError(f"layer={index} is not one of {len(self._layers)}")
        return self._layers[index]

    # What moves bytes, in the order of torch's current stream -----------------------------------

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes blocks what others were before the call, in all layers.

        Args:
            sources: blocks; may be among the targets.
            targets: as many, each once.
        """
        if not sources:
            return
        origin, target = self._upload(np.array(sources, np.int64), np.array(targets, np.int64))
        for bits in self._bits:
            bits.index_copy_(self._block_dim, target, bits.index_select(self._block_dim, origin))
        self.copied_bytes += len(sources) * self.block_bytes

    def zero_blocks(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks in all layers."""
        if blocks:
            (places,) = self._upload(np.array(blocks, np.int64))
            for bits in self._bits:
                bits.index_fill_(self._block_dim, places, 0)

    def clean(self, blocks: Sequence[int]) -> None:
        """See :meth:`.sequences.Sequences.clean`: nobody reads what is no number."""
        self.zero_blocks(blocks)

    def zero_tokens(self, slot: int, first: int, last: int) -> None:
        """Zeroes the tokens of a slot from ``first`` to before ``last``, in all layers."""
        if first < last:
            positions = np.arange(first, last)
            places = self.locate(np.full(len(positions), slot), positions)
            (index,) = self._upload(places)
            for bits in self._bits:
                dim = self._block_dim
                bits.flatten(dim, dim + 1).index_fill_(dim, index, 0)

    # Reports --------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Figures of this moment; a page is a block.

        ``kept_bytes`` are of free blocks that can still be found by their content; ``reserved`` is
        what was allocated, all of it, whether used or not. No driver is called: ``pages_mapped``
        counts blocks handed out to be written, ``pages_aliased`` those shared.
        """
        size, blocks = self.block_bytes, self.blocks
        tokens, kept = int(self.lengths.sum()), blocks.kept
        return CacheStats(
            open_slots=self.open_slots,
            kept_slots=0,
            tokens=tokens,
            token_bytes=tokens * self.token_bytes,
            live_bytes=blocks.live * size,
            shared_bytes=blocks.shared * size,
            cover_bytes=0,
            stale_bytes=kept * size,
            kept_bytes=kept * size,
            scratch_bytes=size,
            pooled_bytes=(blocks.free - kept) * size,
            reserved_bytes=self.num_blocks * size,
            budget_bytes=(blocks.limit + 1) * size,
            page_bytes=size,
            pages_mapped=blocks.taken,
            pages_adopted=0,
            pages_aliased=blocks.hits,
            pages_recycled=0,
            pages_reclaimed=0,
            copied_bytes=self.copied_bytes,
            evicted_tokens=blocks.overwritten * self.block_tokens,
            driver_calls={},
        )

    def close(self) -> None:
        """Gives its memory back, as far as nobody has a tensor of it."""
        self._layers, self._bits = {}, []

    def check(self) -> None:
        """See :meth:`.sequences.Sequences.check`; and that it is as large as it says."""
        super().check()
        bits = sum(bits.nbytes for bits in self._bits)
        assert bits in (0, self.num_blocks * self.block_bytes), bits

    def __repr__(self) -> str:
        size = format_bytes(self.num_blocks * self.block_bytes)
        return (
            f"PagedCache({len(self.specs)} layers, {self.max_seqs} x {self.max_tokens} tokens, "
            f"{self.num_blocks} blocks of {self.block_tokens} tokens, {size} on {self.device})"
        )
