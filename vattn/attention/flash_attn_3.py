"""FlashAttention-3 for Hopper: the package ``flash_attn_interface``, and the build in vLLM's wheel.

Both calls use the kvcache form; the kernel chooses how to split long sequences over the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, window_sizes, with_sinks
from vattn.attention.flash_calls import Call
from vattn.attention.operators import Kernel, bind, library_operator, python_function

_PACKAGE = (
    "q k_cache v_cache cache_seqlens cache_batch_idx cu_seqlens_q max_seqlen_q softmax_scale "
    "causal window_size softcap num_splits return_softmax_lse"
)
_VLLM = (
    "q k v cu_seqlens_q seqused_k max_seqlen_q kv_batch_idx softmax_scale is_causal "
    "window_size_left window_size_right softcap num_splits s_aux"
)
# Of further arguments, the values that switch off what they are for.
_VLLM_CONSTANTS = {
    "is_rotary_interleaved": True,
    "attention_chunk": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


def flash3_tiles(head_dim: int) -> tuple[int, ...]:
    """Tokens that the kernel may load at once, in half precision; it depends on the mask too.

    The last tile is loaded whole, counted from the slot's start.
    """
    if head_dim <= 64:
        return (128, 160, 192)
    if head_dim <= 96:
        return (128, 144)
    if head_dim <= 128:
        return (128, 176)
    if head_dim <= 192:
        return (96, 112, 128)
    return (64, 80)


def load_package() -> Kernel:
    """The kernel of the package ``flash_attn_interface``.

    Raises:
        Unavailable: it is not installed, or takes other arguments than we know.
    """
    function = python_function("flash_attn_interface", "flash_attn_with_kvcache")
    return bind("flash_attn_with_kvcache", function, _PACKAGE)


def load_vllm() -> Kernel:
    """The kernel of FlashAttention-3 in vLLM's wheel.

    Raises:
        Unavailable: vLLM is not installed, or its kernel takes other arguments than we know.
    """
    file = "vllm_flash_attn/_vllm_fa3_C*.so"
    operator = library_operator("vllm", file, "_vllm_fa3_C", "fwd")
    return bind("_vllm_fa3_C::fwd", operator, _VLLM, _VLLM_CONSTANTS)


class FlashAttention3Backend(FlashBackend):
    """The package ``flash_attn_interface``.

    Args:
        specs: of the layers it will serve.
        kernel: takes the arguments of :func:`load_package`'s.
    """

    name = "flash_attn_3"
    architectures = (9,)
    tiles = staticmethod(flash3_tiles)

    def __init__(self, specs: Iterable[AttentionSpec] = (), kernel: Kernel | None = None) -> None:
        super().__init__(specs)
        self._kernel = load_package() if kernel is None else kernel

    def attend(
        self,
        call: Call,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`FlashBackend.attend`."""
        queries, starts, longest = _queries(call, query)
        out, lse, *_ = self._kernel(
            q=queries,
            k_cache=k[:, : call.longest_kv],
            v_cache=v[:, : call.longest_kv],
            cache_seqlens=call.kv_lens,
            cache_batch_idx=call.slots,
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            softmax_scale=spec.scale,
            causal=True,
            window_size=window_sizes(spec),
            softcap=spec.softcap or 0.0,
            num_splits=0,
            return_softmax_lse=True,
        )
        if call.decodes:
            return with_sinks(out.squeeze(1), lse.squeeze(-1), sinks, head_dim_of_lse=1)
        return with_sinks(out, lse, sinks, head_dim_of_lse=0)


class VllmFlashAttention3Backend(FlashBackend):
    """FlashAttention-3 as vLLM's wheel carries it; it knows attention sinks itself.

    Args:
        specs: of the layers it will serve.
        kernel: takes the arguments of :func:`load_vllm`'s.
    """

    name = "vllm_flash_attn_3"
    architectures = (9,)
    tiles = staticmethod(flash3_tiles)

    def __init__(self, specs: Iterable[AttentionSpec] = (), kernel: Kernel | None = None) -> None:
        super().__init__(specs)
        self._kernel = load_vllm() if kernel is None else kernel

    def attend(
        self,
        call: Call,
        spec: AttentionSpec,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`FlashBackend.attend`."""
        queries, starts, longest = _queries(call, query)
        left, right = window_sizes(spec)
        out: torch.Tensor
        out, *_ = self._kernel(
            q=queries,
            k=k[:, : call.longest_kv],
            v=v[:, : call.longest_kv],
            cu_seqlens_q=starts,
            seqused_k=call.kv_lens,
            max_seqlen_q=longest,
            kv_batch_idx=call.slots,
            softmax_scale=spec.scale,
            is_causal=True,
            window_size_left=left,
            window_size_right=right,
            softcap=spec.softcap or 0.0,
            num_splits=0,
            s_aux=None if sinks is None else sinks.to(torch.bfloat16),
        )
        return out.squeeze(1) if call.decodes else out


def _queries(call: Call, query: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """Queries with where each sequence's begin and how many there are at most, if they differ."""
    if call.decodes:
        return query.unsqueeze(1), None, None
    return query, call.query_starts, call.longest_query
