"""A kernel library on a CPU that reads slots and blocks, told to be wrong where a test wants it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch

import bench.paged.kernels
from bench.levels.kernels import sides as kernels_sides
from bench.paged.calls import PagedCall
from bench.paged.flash_kernels import FlashKernel
from bench.paged.kernels import PagedKernel
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New
from vattn.attention.flash_calls import Call


def attend(
    query: torch.Tensor,
    starts: torch.Tensor,
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """Causal attention of packed queries ``[T, heads, d]``, sequences ``[tokens, kv_heads, d]``."""
    outs = []
    for i, (keys, values) in enumerate(sequences):
        q = query[starts[i] : starts[i + 1]]
        group = q.shape[1] // keys.shape[1]
        k, v = (x.float().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
        last = torch.arange(len(q))[:, None] + len(k) - len(q)
        scores = scores.masked_fill(torch.arange(len(k))[None] > last, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype))
    return torch.cat(outs)


class Slots(FlashBackend):
    """Reads slots as an engine's backend does."""

    name = "fake"
    misreads: ClassVar[int] = 0  # tokens left out of every sequence

    @staticmethod
    def load() -> Any:
        return "loaded"

    @staticmethod
    def tiles(head_dim: int) -> tuple[int, ...]:
        return (1,)

    def attend(
        self,
        call: Call,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        new: New | None = None,
    ) -> torch.Tensor:
        assert call.decodes == (call.longest_query == 1)
        assert (call.past_lens + call.query_starts.diff() == call.kv_lens).all()
        read = [
            tuple(x[slot, : max(1, length - self.misreads)] for x in (k, v))
            for slot, length in zip(call.slots.tolist(), call.kv_lens.tolist(), strict=True)
        ]
        pairs = [(kv[0], kv[1]) for kv in read]
        return attend(query, call.query_starts, pairs, spec.scale)


class Blocks(FlashKernel):
    """Reads blocks of a multiple of 16 tokens."""

    name = "fake"
    block_multiple = 16
    contiguous = Slots
    misreads_blocks: ClassVar[tuple[int, ...]] = ()  # of which it misses the last token

    @classmethod
    def load(cls) -> Any:
        return "loaded"

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        return None

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
        assert k.shape[1] == call.block_tokens
        missed = int(call.block_tokens in self.misreads_blocks)
        read = [
            tuple(x[row.long()].flatten(0, 1)[: max(1, length - missed)] for x in (k, v))
            for row, length in zip(call.table, call.kv_lens.tolist(), strict=True)
        ]
        pairs = [(kv[0], kv[1]) for kv in read]
        return attend(query, call.query_starts, pairs, spec.scale)


@contextmanager
def installed(
    monkeypatch: pytest.MonkeyPatch, *kernels: type[PagedKernel]
) -> Iterator[dict[str, type[PagedKernel]]]:
    """Only these kernels are known."""
    known = {kernel.name: kernel for kernel in kernels}
    with monkeypatch.context() as patch:
        patch.setattr(bench.paged.kernels, "kinds", lambda: known)
        patch.setattr(kernels_sides, "kinds", lambda: known)
        yield known
