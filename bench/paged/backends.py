"""The engine's attention backend over blocks, for any paged kernel.

A step makes two calls, decodes and chunks, as ours does. New K and V go to their blocks by the same
code that writes to slots, blocks in place of slots; where the kernel appends decodes itself, it
does here as well. The table of a call is gathered on the device from the persistent one, once per
step for all layers; in a recorded graph that and the places of new tokens are computed inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.paged.calls import HostCall, PagedCall
from bench.paged.kernels import PagedKernel
from vattn.attention.append import append, append_mode
from vattn.attention.base import AppendMode, AttentionSpec, Int32, Step
from vattn.attention.flash_calls import DecodeTensors
from vattn.kv.layout import Order

if TYPE_CHECKING:
    from bench.paged.cache import PagedCache


class PagedBackend:
    """See :class:`vattn.attention.base.Backend`; steps are over a ``PagedCache``.

    Args:
        kernel: what attends.
        specs: of the layers that it will serve.
        device: where it runs.
    """

    # Blocks are whole; no tile of a kernel is ever without memory.
    kv_tile_tokens: tuple[int, ...] = (1,)

    def __init__(
        self, kernel: PagedKernel, specs: Sequence[AttentionSpec], device: torch.device
    ) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self.order: Order | None = kernel.order
        self.graphs = kernel.graphs
        self._specs = list(specs)
        self._device = device
        self._checked = 0  # block size that the kernel was asked about

    @property
    def append_mode(self) -> AppendMode:
        """How decodes' K and V get into their blocks."""
        return "kernel" if self.kernel.appends else append_mode(self._device)

    def refusal(self, spec: AttentionSpec, device: torch.device) -> str | None:
        """See :meth:`vattn.attention.base.Backend.refusal`."""
        return self.kernel.refusal(spec, device)

    def check_block(self, block_tokens: int) -> None:
        """Refuses a block size that the kernel does not take.

        Raises:
            ValueError: says which it takes.
        """
        self.kernel.check_block(block_tokens)

    # A step ---------------------------------------------------------------------------------------

    def prepare(self, step: Step, specs: Sequence[AttentionSpec]) -> None:
        """Moves places, slots and lengths to the device, in one transfer, and plans the calls."""
        cache = self._cache(step)
        blocks, offsets = cache.find(np.repeat(step.slots, step.query_lens), step.positions())
        bounds = [(0, step.num_decodes), (step.num_decodes, len(step.slots))]
        parts = [part for part in bounds if part[0] < part[1]]
        arrays: list[Any] = [blocks, offsets]
        for first, last in parts:
            lens, kv_lens = step.query_lens[first:last], step.kv_lens[first:last]
            starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
            arrays += [step.slots[first:last], kv_lens, kv_lens - lens, starts]
        step.write_slots, step.write_positions, *tensors = step.upload(*arrays)
        calls, row = [], 0
        for i, (first, last) in enumerate(parts):
            slots, kv_lens_, past_lens, starts_ = tensors[4 * i : 4 * i + 4]
            lens, longest = step.query_lens[first:last], int(step.kv_lens[first:last].max())
            calls.append(
                PagedCall(
                    rows=slice(row, row + int(lens.sum())),
                    decodes=last <= step.num_decodes,
                    block_tokens=cache.block_tokens,
                    table=_rows(cache, slots, longest),
                    kv_lens=kv_lens_,
                    past_lens=past_lens,
                    query_starts=starts_,
                    longest_query=int(lens.max()),
                    longest_kv=longest,
                    host=self._host(cache, step, first, last, longest),
                )
            )
            row += int(lens.sum())
        for call in calls:
            self.kernel.plan(call, specs)
        step.plan["calls"] = calls

    def _host(
        self, cache: PagedCache, step: Step, first: int, last: int, longest: int
    ) -> HostCall | None:
        if not self.kernel.plans_on_host:
            return None
        slots: Int32 = step.slots[first:last]
        return HostCall(
            lambda: cache.tables.host[slots, : _blocks(cache, longest)],
            step.query_lens[first:last],
            step.kv_lens[first:last],
        )

    def prepare_decode(self, step: Step, tensors: DecodeTensors) -> None:
        """Like :meth:`prepare`, of decodes only, over memory that others fill in; no transfer.

        The tables are read when the step runs, so a recorded one finds the blocks of that moment.
        """
        if not self.graphs:
            raise ValueError(f"decodes of {self.name} cannot be recorded; see its module")
        cache = self._cache(step)
        table = _rows(cache, tensors.slots, tensors.longest_kv)
        size = cache.block_tokens
        column = torch.div(tensors.positions, size, rounding_mode="floor")
        step.write_slots = table.gather(1, column.unsqueeze(1)).squeeze(1).long()
        step.write_positions = tensors.positions - column * size
        step.plan["calls"] = [
            PagedCall(
                rows=slice(0, len(tensors.slots)),
                decodes=True,
                block_tokens=size,
                table=table,
                kv_lens=tensors.kv_lens,
                past_lens=tensors.past_lens,
                query_starts=tensors.query_starts,
                longest_query=1,
                longest_kv=tensors.longest_kv,
            )
        ]

    def _cache(self, step: Step) -> PagedCache:
        cache: PagedCache = step.cache  # type: ignore[assignment]
        if self._checked != cache.block_tokens:
            self.kernel.check_block(cache.block_tokens)
            if cache.order != self.order:
                raise ValueError(
                    f'{self.name} needs blocks in order="{self.order}", not "{cache.order}"'
                )
            self._checked = cache.block_tokens
        return cache

    def forward(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends K and V, then attends; see :meth:`vattn.attention.base.Backend.forward`."""
        k, v = step.cache.layer(layer)
        calls: list[PagedCall] = step.plan["calls"]
        kernel = self.kernel
        in_kernel = calls[0].rows.stop if kernel.appends and calls[0].decodes else 0
        if in_kernel < len(key):
            # Blocks and places in them stand where slots and positions do.
            append(layer, key, value, step, slice(in_kernel, None) if in_kernel else None)
        outs = []
        for call in calls:
            wanted = kernel.appends if call.decodes else kernel.reads_new
            new = (key[call.rows], value[call.rows]) if wanted else None
            outs.append(kernel.attend(call, spec, query[call.rows], k, v, sinks, new))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _blocks(cache: PagedCache, tokens: int) -> int:
    return -(-tokens // cache.block_tokens)


def _rows(cache: PagedCache, slots: torch.Tensor, longest: int) -> torch.Tensor:
    """The slots' rows of the table on the device, as wide as the longest sequence needs.

    A view of whole rows: a kernel that looks a few entries ahead stays within their memory.
    """
    return cache.tables.device.index_select(0, slots)[:, : _blocks(cache, longest)]
