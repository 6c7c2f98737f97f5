"""Paged attention kernels behind one interface, found and checked when they are loaded.

Use, for a benchmark of kernels::

    kernels, missing = load_kernels(device, specs)      # objects by name, reasons by name
    for kernel in kernels.values():
        for block in kernel.block_sizes(spec):
            k, v = kernel.empty(spec, num_blocks, block, device)   # in the order that it wants
            call = make_call(table, kv_lens, query_lens, block, device)
            kernel.plan(call, [spec])                   # once per step, for all its layers
            out = kernel.attend(call, spec, query, k, v)

A kernel that is not installed, or takes other arguments than we know, is reported with the reason
and never replaced.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch

from bench.paged.calls import PagedCall
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import New
from vattn.attention.operators import Unavailable
from vattn.kv.layout import Order

# What sizes are tried; each kernel names those of them that it takes.
BLOCK_SIZES = (16, 32, 64, 128, 256, 512)

Missing = Unavailable


class PagedKernel(abc.ABC):
    """A kernel that reads K and V from blocks.

    Attributes:
        appends: ``attend`` takes decodes' new K and V and writes them itself.
    """

    name: ClassVar[str]
    # How it wants blocks to lie: "token" ``[num_blocks, block_tokens, kv_heads, head_dim]``, which
    # all do, or "head" ``[kv_heads, num_blocks, block_tokens, head_dim]``.
    order: ClassVar[Order] = "token"
    # Whether decodes may be captured in a CUDA graph.
    graphs: ClassVar[bool] = True
    # Whether plan() needs what a call knows on the host.
    plans_on_host: ClassVar[bool] = False
    # Whether attend() makes use of the new K and V of chunks, too.
    reads_new: ClassVar[bool] = False
    # Blocks are multiples of so many tokens.
    block_multiple: ClassVar[int]
    appends: bool = False

    @classmethod
    @abc.abstractmethod
    def create(cls, specs: Sequence[AttentionSpec], device: torch.device) -> PagedKernel:
        """For a model's layers on a device.

        Raises:
            Unavailable: it is not installed or not one that we know.
        """

    @classmethod
    @abc.abstractmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve a layer on a device; None if it can."""

    @classmethod
    @abc.abstractmethod
    def tile_tokens(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """Tokens of K and V that it loads at once; one of these, by the call."""

    @classmethod
    def block_sizes(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """Block sizes worth trying, of those that it accepts for a layer; ascending."""
        del spec
        return tuple(size for size in BLOCK_SIZES if size % cls.block_multiple == 0)

    @classmethod
    def check_block(cls, block_tokens: int) -> None:
        """Refuses a block size that it does not take.

        Raises:
            ValueError: says which it takes.
        """
        if block_tokens < 1 or block_tokens % cls.block_multiple:
            raise ValueError(
                f"block_tokens={block_tokens}: {cls.name} takes multiples of {cls.block_multiple}"
            )

    @classmethod
    def empty(
        cls, spec: AttentionSpec, num_blocks: int, block_tokens: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, zeros, in :attr:`order`."""
        shape: tuple[int, ...] = (num_blocks, block_tokens, spec.kv_heads, spec.head_dim)
        if cls.order == "head":
            shape = (spec.kv_heads, num_blocks, block_tokens, spec.head_dim)
        k, v = (torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(2))
        return k, v

    def plan(self, call: PagedCall, specs: Sequence[AttentionSpec]) -> None:
        """Computes what all layers of a step share, into ``call.plan``; most kernels need nothing.

        Args:
            call: of the step.
            specs: of all layers.
        """
        del call, specs

    @abc.abstractmethod
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
        """Attention of the sequences' last tokens, causal.

        Args:
            call: which sequences; planned before if the kernel plans.
            spec: of the layer.
            query: ``[T, heads, head_dim]``, the call's own rows.
            k: blocks in :attr:`order`.
            v: like ``k``.
            sinks: ``[heads]``, if the spec has them.
            new: K and V ``[T, kv_heads, head_dim]`` of the queries' tokens. Of decodes, where the
                kernel :attr:`appends`: to be written first; None if they are in the blocks. Of
                chunks, where it ``reads_new``: at hand without reading blocks; None is allowed.

        Returns:
            Like ``query``.
        """


def kinds() -> dict[str, type[PagedKernel]]:
    """All kernels, in order of preference: as ours, then what ours has no counterpart of."""
    from bench.paged.flash_kernels import (
        PagedFlash2,
        PagedFlash3,
        PagedTorch,
        PagedVllmFlash2,
        PagedVllmFlash3,
    )
    from bench.paged.flashinfer import FlashInfer
    from bench.paged.gather import SdpaGather, SdpaGatherWhole

    listed: tuple[type[PagedKernel], ...] = (
        PagedFlash3,
        PagedVllmFlash3,
        PagedFlash2,
        PagedVllmFlash2,
        PagedTorch,
        FlashInfer,
        SdpaGather,
        SdpaGatherWhole,
    )
    return {kind.name: kind for kind in listed}


def load_kernel(name: str, specs: Sequence[AttentionSpec], device: torch.device) -> PagedKernel:
    """One kernel.

    Raises:
        Unavailable: it is absent or cannot serve the layers on the device; the message says why.
        ValueError: no kernel has that name.
    """
    known = kinds()
    if name not in known:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(known)}")
    for layer, spec in enumerate(specs):
        reason = known[name].refusal(spec, device)
        if reason is not None:
            raise Unavailable(f"layer {layer}: {reason}")
    return known[name].create(specs, device)


def load_kernels(
    device: torch.device, specs: Sequence[AttentionSpec], names: Sequence[str] | None = None
) -> tuple[dict[str, PagedKernel], dict[str, str]]:
    """The kernels that work here for these layers, and why the others do not; both by name.

    Raises:
        ValueError: no kernel has one of the names.
    """
    found: dict[str, PagedKernel] = {}
    missing: dict[str, str] = {}
    for name in kinds() if names is None else names:
        try:
            found[name] = load_kernel(name, specs, device)
        except Unavailable as reason:
            missing[name] = str(reason)
    return found, missing
