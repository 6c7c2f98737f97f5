"""FlashAttention-3 for Hopper: the package ``flash_attn_interface``, and the build in vLLM's wheel.

Both calls use the kvcache form; the kernel chooses how to split long sequences over the GPU, and
writes the new K and V of decodes if it was built for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New, new_rows, window_sizes, with_sinks
from vattn.attention.flash_calls import Call
from vattn.attention.operators import Kernel, bind, library_operator, python_function, takes

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


@dataclass(frozen=True)
class Flash3Kernel:
    """The entrance, by the names that :meth:`FlashAttention3Backend.attend` passes.

    It returns the output, the log-sum-exp, and maybe more. ``appends``: it takes the new ``k`` and
    ``v``, too. ``knows_sinks``: it takes ``sinks``, in bfloat16.
    """

    forward: Kernel
    appends: bool
    knows_sinks: bool


def load_package() -> Flash3Kernel:
    """The kernel of the package ``flash_attn_interface``.

    Raises:
        Unavailable: it is not installed, or takes other arguments than we know.
    """
    function = python_function("flash_attn_interface", "flash_attn_with_kvcache")
    bound = bind("flash_attn_with_kvcache", function, _PACKAGE)

    def forward(window: tuple[int, int], **given: Any) -> Any:
        return bound(causal=True, window_size=window, return_softmax_lse=True, **given)

    return Flash3Kernel(forward, takes(function, "k v"), knows_sinks=False)


def load_vllm() -> Flash3Kernel:
    """The kernel of FlashAttention-3 in vLLM's wheel.

    Raises:
        Unavailable: vLLM is not installed, or its kernel takes other arguments than we know.
    """
    file = "vllm_flash_attn/_vllm_fa3_C*.so"
    operator = library_operator("vllm", file, "_vllm_fa3_C", "fwd")
    bound = bind("_vllm_fa3_C::fwd", operator, _VLLM, _VLLM_CONSTANTS)

    def forward(
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_seqlens: torch.Tensor,
        cache_batch_idx: torch.Tensor,
        window: tuple[int, int],
        sinks: torch.Tensor | None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        **given: Any,
    ) -> Any:
        if k is not None:
            given |= {"k_new": k, "v_new": v}
        return bound(
            k=k_cache,
            v=v_cache,
            seqused_k=cache_seqlens,
            kv_batch_idx=cache_batch_idx,
            is_causal=True,
            window_size_left=window[0],
            window_size_right=window[1],
            s_aux=sinks,
            **given,
        )

    return Flash3Kernel(forward, takes(operator, "k_new v_new"), knows_sinks=True)


class FlashAttention3Backend(FlashBackend):
    """The package ``flash_attn_interface``."""

    name = "flash_attn_3"
    architectures = (9,)
    tiles = staticmethod(flash3_tiles)
    _kernel: Flash3Kernel

    @staticmethod
    def load() -> Flash3Kernel:
        """See :func:`load_package`."""
        return load_package()

    @classmethod
    def create(
        cls,
        specs: Sequence[AttentionSpec],
        device: torch.device,
        *,
        append_in_kernel: bool | None = None,
    ) -> Self:
        """See :meth:`FlashBackend.create`; tries once whether the kernel really appends."""
        backend = super().create(specs, device, append_in_kernel=append_in_kernel)
        if backend.appends and not backend.was_built_to_append(specs[0], device):
            if append_in_kernel:
                raise backend.cannot_append()
            backend.appends = False
        return backend

    def can_append(self, specs: Sequence[AttentionSpec]) -> bool:
        """See :meth:`FlashBackend.can_append`."""
        del specs
        return self._kernel.appends

    def was_built_to_append(self, spec: AttentionSpec, device: torch.device) -> bool:
        """Whether the kernel appends a token to an empty cache, or says that it cannot.

        A build may have left appending out, as vLLM's did up to 0.25, and takes the arguments.
        """
        zero, one = (torch.tensor([x], dtype=torch.int32, device=device) for x in (0, 1))
        starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
        call = Call(
            rows=slice(0, 1),
            decodes=True,
            slots=zero,
            kv_lens=one,
            past_lens=zero,
            query_starts=starts,
            kv_starts={},
            longest_query=1,
            longest_kv=1,
        )
        query = torch.zeros(1, spec.heads, spec.head_dim, dtype=spec.dtype, device=device)
        new = query.new_zeros(1, spec.kv_heads, spec.head_dim)
        k, v = (new.new_zeros(1, max(self.kv_tile_tokens), *new.shape[1:]) for _ in range(2))
        try:
            self.attend(call, spec, query, k, v, None, (new, new))
        except RuntimeError as error:
            if "does not support appending" not in str(error):
                raise
            return False
        return True

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
        """See :meth:`FlashBackend.attend`."""
        given: dict[str, Any] = new_rows(new)
        if self._kernel.knows_sinks:
            given["sinks"] = None if sinks is None else sinks.to(torch.bfloat16)
        out: torch.Tensor
        out, lse, *_ = self._kernel.forward(
            q=query.unsqueeze(1) if call.decodes else query,
            k_cache=k[:, : call.longest_kv],
            v_cache=v[:, : call.longest_kv],
            cache_seqlens=call.kv_lens if new is None else call.past_lens,
            cache_batch_idx=call.slots,
            cu_seqlens_q=None if call.decodes else call.query_starts,
            max_seqlen_q=None if call.decodes else call.longest_query,
            softmax_scale=spec.scale,
            window=window_sizes(spec),
            softcap=spec.softcap or 0.0,
            num_splits=0,
            **given,
        )
        if call.decodes:
            out, lse = out.squeeze(1), lse.squeeze(-1)
        if self._kernel.knows_sinks:
            return out
        return with_sinks(out, lse, sinks, head_dim_of_lse=int(call.decodes))


class VllmFlashAttention3Backend(FlashAttention3Backend):
    """FlashAttention-3 as vLLM's wheel carries it; it knows attention sinks itself."""

    name = "vllm_flash_attn_3"

    @staticmethod
    def load() -> Flash3Kernel:
        """See :func:`load_vllm`."""
        return load_vllm()
