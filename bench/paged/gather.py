"""K and V gathered from their blocks, then PyTorch's dense attention: what a CPU has for paging.

The calls, masks and head packing are those of ``vattn.attention.sdpa``, on a copy: one
``index_select`` for K and one for V into buffers that are kept. What decides is how much is copied
at once. Time of decode attention over that of the contiguous cache (above 1: contiguous is faster),
float32, 32 heads on 8 KV heads of 64, blocks of 32, runs in turns, one thread of a busy machine of
two cores with 1 MiB of L2 each and 32 MiB of L3; differences below 0.15 mean nothing:

=============  ========  ========  =========  =========
K at once      64 x 128  64 x 512  64 x 2048  1 x 16384
=============  ========  ========  =========  =========
512 KiB            1.27      1.50       1.42       1.43
1 MiB              1.14      1.19       1.16       1.29
2 MiB              1.21      1.01       1.17       1.23
4 MiB              1.29      1.33       1.36       1.38
8 MiB              1.52      1.65       1.53       1.76
all of a call      1.51      1.71       1.41       1.89
=============  ========  ========  =========  =========

So calls are cut into pieces that stay in the cache, and a sequence that is longer than a piece is
attended to piece by piece and merged. With 2 MiB, blocks of 16, 32, 64, 128 and 256 tokens gave
0.96 to 1.42, 1.01 to 1.23, 1.05 to 1.26, 1.03 to 1.24 and 1.04 to 1.09: no difference that is
certain from 32 on, and 32 wastes the least. ``k[blocks]``, into new memory each time, made the
whole 3 to 8 times as slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from bench.paged.calls import PagedCall
from bench.paged.gather_plan import Chunks, Cost, Cuts, DecodePlan, Group, chunk_groups
from bench.paged.kernels import PagedKernel
from vattn.attention import dense
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import New
from vattn.attention.sdpa import (
    CALL_ELEMENTS,
    SdpaBackend,
    attend_decodes,
    by_sequence,
    needs_matmul,
)
from vattn.attention.sdpa_plan import Plan

# Of K, and as much of V, gathered before it is read.
_PIECE_BYTES = 2 << 20


class SdpaGather(PagedKernel):
    """Gather and attend, by pieces that stay in the CPU's cache.

    Args:
        device: where it runs.
        piece_bytes: of K to gather at once; None for all of a call, as ours would cut it.
    """

    name = "sdpa-gather"
    graphs = False  # which sequences share a call is decided step by step
    block_multiple = 1
    plans_on_host = True
    reads_new = True

    def __init__(
        self, device: torch.device | str = "cpu", piece_bytes: int | None = _PIECE_BYTES
    ) -> None:
        self._device = torch.device(device)
        # Elsewhere no cache holds a piece, and pieces of one sequence could not be merged.
        self._piece_bytes = piece_bytes if self._device.type == "cpu" else None
        self._cuts = Cuts()
        self._dense = SdpaBackend(device=self._device)  # attends to chunks
        self._buffers: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    @classmethod
    def create(cls, specs: Sequence[AttentionSpec], device: torch.device) -> Self:
        """See :meth:`PagedKernel.create`; there is nothing that could be missing."""
        del specs
        return cls(device)

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """See :meth:`PagedKernel.refusal`."""
        return SdpaBackend.refusal(spec, device)

    @classmethod
    def tile_tokens(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """See :meth:`PagedKernel.tile_tokens`; what is gathered is cut at the longest sequence."""
        del spec
        return (1,)

    def plan(self, call: PagedCall, specs: Sequence[AttentionSpec]) -> None:
        """See :meth:`PagedKernel.plan`: cuts the call, once per kind of layer."""
        host = call.on_host()
        for spec in dict.fromkeys(specs):
            key = self._key(spec)
            if key in call.plan:
                continue
            if call.decodes:
                call.plan[key] = self._cuts.plan(
                    host, call.block_tokens, spec.window, self._cost(spec), self._device
                )
            else:
                most = self._piece_tokens(spec) or call.longest_kv * len(call)
                groups = chunk_groups(host, call.block_tokens, spec.window, self._device, most)
                call.plan[key] = groups, Plan([], [group.call for group in groups])

    def _key(self, spec: AttentionSpec) -> tuple[object, ...]:
        return (spec.window, self._cost(spec))

    def _cost(self, spec: AttentionSpec) -> Cost:
        may_merge = dense.tells_lse(self._device) and spec.softcap is None
        call_tokens = CALL_ELEMENTS / (spec.kv_heads * spec.head_dim)
        return Cost(call_tokens, self._piece_tokens(spec), may_merge)

    def _piece_tokens(self, spec: AttentionSpec) -> int | None:
        if self._piece_bytes is None:
            return None
        return max(1, self._piece_bytes // (spec.kv_heads * spec.head_dim * spec.dtype.itemsize))

    def attend(
        self,
        call: PagedCall,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
        new: New | None = None,
    ) -> torch.Tensor:
        """See :meth:`PagedKernel.attend`."""
        planned = call.plan[self._key(spec)]
        if call.decodes:
            return self._decodes(planned, call.block_tokens, spec, query, k, v, sinks)
        groups, masks = planned
        parts = []
        for group in groups:
            chunk = group.call
            if chunk.start == 0 and new is not None:
                # What was just computed is at hand; nothing is gathered.
                seen = [by_sequence(x, chunk).transpose(1, 2) for x in new]
            else:
                seen = [self._chunk_kv(x, group, i) for i, x in enumerate((k, v))]
            own = by_sequence(query, chunk).transpose(1, 2)
            out = self._dense.attend_chunk(chunk, spec, own, seen[0], seen[1], masks, sinks)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decodes(
        self,
        plan: DecodePlan,
        block_tokens: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if plan.order is not None:
            query = query.index_select(0, plan.order)
        outs = []
        for group in plan.groups:
            own = query[group.first : group.last]
            if len(group.spans) == 1:
                key, value = self._span(group, 0, block_tokens, k, v)
                outs.append(attend_decodes(spec, own, key, value, group.mask, sinks))
            else:
                outs.append(self._merged(group, block_tokens, spec, own, k, v, sinks))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if plan.back is None else out.index_select(0, plan.back)

    def _merged(
        self,
        group: Group,
        block_tokens: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One sequence, a span at a time."""
        assert group.mask is None
        assert not needs_matmul(spec, query)
        grouped = query.reshape(len(query), spec.kv_heads, -1, spec.head_dim)
        total: tuple[torch.Tensor, torch.Tensor | None] | None = None
        for i in range(len(group.spans)):
            key, value = self._span(group, i, block_tokens, k, v)
            part = dense.attend(grouped, key, value, scale=spec.scale)
            total = part if total is None else dense.merge(total, part)
        assert total is not None
        out, lse = total
        if sinks is not None:
            assert lse is not None
            out = dense.add_sinks(out, lse, sinks.view(1, spec.kv_heads, -1))
        return out.reshape(query.shape)

    # Gathering ------------------------------------------------------------------------------------

    def _span(
        self, group: Group, index: int, block_tokens: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a span, ``[n, kv_heads, tokens, head_dim]``, in buffers of this object."""
        span = group.spans[index]
        n = group.last - group.first
        tokens = len(span.blocks) // n * block_tokens
        key, value = (
            self._gather(x, span.blocks, i)
            .view(n, tokens, *x.shape[2:])[:, span.begin : span.end]
            .transpose(1, 2)
            for i, x in enumerate((k, v))
        )
        return key, value

    def _chunk_kv(self, blocks: torch.Tensor, group: Chunks, which: int) -> torch.Tensor:
        """What chunks see, ``[B, kv_heads, start + n, head_dim]``; below a window it is garbage."""
        n, tokens = group.call.sequences, group.call.start + group.call.n
        per_token = blocks[0, 0].numel()
        skipped = group.begin * per_token if n == 1 else 0
        kv = self._gather(blocks, group.blocks, which, skipped)
        return kv.view(n, -1, *blocks.shape[2:])[:, :tokens].transpose(1, 2)

    def _gather(
        self, source: torch.Tensor, blocks: torch.Tensor, which: int, skipped: int = 0
    ) -> torch.Tensor:
        """Blocks one after the other, behind ``skipped`` elements; flat, until the next gather."""
        rows = source.view(len(source), -1)
        size = skipped + len(blocks) * rows.shape[1]
        buffer = self._buffers.get((source.dtype, which))
        if buffer is None or len(buffer) < size:
            # Written in place for ever, whatever mode somebody may be in.
            with torch.inference_mode(False):
                buffer = source.new_empty(1 << (size - 1).bit_length())
            self._buffers[source.dtype, which] = buffer
        torch.index_select(
            rows, 0, blocks, out=buffer[skipped:size].view(len(blocks), rows.shape[1])
        )
        return buffer[:size]


class SdpaGatherWhole(SdpaGather):
    """All that a call reads is gathered before it is read: the plain form, and the slower one."""

    name = "sdpa-gather-whole"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device, piece_bytes=None)
