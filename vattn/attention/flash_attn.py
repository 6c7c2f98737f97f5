"""FlashAttention-2: the package ``flash_attn``, and the build inside vLLM's wheel.

Decodes use the kvcache form, which splits long sequences over the GPU; chunks use the flat form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, flat, window_sizes, with_sinks
from vattn.attention.flash_calls import Call
from vattn.attention.operators import Kernel, bind, library_operator, python_function


def flash2_tiles(head_dim: int) -> tuple[int, ...]:
    """Tokens that FlashAttention-2 loads at once: of the split kernel, a multiple of the others'.

    It does not load past the last token, but below a window it loads the first tile whole.
    """
    return (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64,)


@dataclass(frozen=True)
class Flash2Kernels:
    """The two entrances. Both return the output and, at ``lse_at``, the log-sum-exp.

    ``decode`` takes the kvcache form, ``chunks`` the flat form, each by the names in
    :data:`DECODE` and :data:`CHUNKS` of the package they are from.
    """

    decode: Kernel
    chunks: Kernel


_PACKAGE_DECODE = (
    "q k_cache v_cache cache_seqlens cache_batch_idx softmax_scale causal window_size softcap "
    "num_splits return_softmax_lse"
)
_PACKAGE_CHUNKS = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
    "window_size_left window_size_right softcap seqused_k"
)
_VLLM_DECODE = (
    "q kcache vcache seqlens_k cache_batch_idx softmax_scale is_causal window_size_left "
    "window_size_right softcap num_splits"
)
_VLLM_CHUNKS = (
    "q k v cu_seqlens_q cu_seqlens_k seqused_k max_seqlen_q max_seqlen_k p_dropout softmax_scale "
    "is_causal window_size_left window_size_right softcap num_splits"
)


def load_package() -> Flash2Kernels:
    """The kernels of the package ``flash_attn``.

    Raises:
        Unavailable: it is not installed, or takes other arguments than we know.
    """
    module = "flash_attn.flash_attn_interface"
    decode = python_function(module, "flash_attn_with_kvcache")
    # The public function for packed batches cannot be told lengths apart from offsets.
    chunks = python_function(module, "_flash_attn_varlen_forward")
    return Flash2Kernels(
        bind("flash_attn_with_kvcache", decode, _PACKAGE_DECODE),
        bind("_flash_attn_varlen_forward", chunks, _PACKAGE_CHUNKS),
    )


def load_vllm() -> Flash2Kernels:
    """The kernels of FlashAttention-2 in vLLM's wheel.

    Raises:
        Unavailable: vLLM is not installed, or its kernels take other arguments than we know.
    """
    place = ("vllm", "vllm_flash_attn/_vllm_fa2_C*.so", "_vllm_fa2_C")
    return Flash2Kernels(
        bind(
            "_vllm_fa2_C::fwd_kvcache",
            library_operator(*place, "fwd_kvcache"),
            _VLLM_DECODE,
            {"is_rotary_interleaved": True},
        ),
        bind(
            "_vllm_fa2_C::varlen_fwd",
            library_operator(*place, "varlen_fwd"),
            _VLLM_CHUNKS,
            {"zero_tensors": False, "return_softmax": False},
        ),
    )


class FlashAttention2Backend(FlashBackend):
    """The package ``flash_attn``, version 2.

    Args:
        specs: of the layers it will serve.
        kernels: as :func:`load_package` returns them.
    """

    name = "flash_attn_2"
    tiles = staticmethod(flash2_tiles)

    def __init__(
        self, specs: Iterable[AttentionSpec] = (), kernels: Flash2Kernels | None = None
    ) -> None:
        super().__init__(specs)
        self._kernels = load_package() if kernels is None else kernels

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
        left, right = window_sizes(spec)
        softcap = spec.softcap or 0.0
        if call.decodes:
            out, lse = self._kernels.decode(
                q=query.unsqueeze(1),
                k_cache=k[:, : call.longest_kv],
                v_cache=v[:, : call.longest_kv],
                cache_seqlens=call.kv_lens,
                cache_batch_idx=call.slots,
                softmax_scale=spec.scale,
                causal=True,
                window_size=(left, right),
                softcap=softcap,
                num_splits=0,
                return_softmax_lse=True,
            )
            return with_sinks(out.squeeze(1), lse.squeeze(-1), sinks, head_dim_of_lse=1)
        out, lse, *_ = self._kernels.chunks(
            q=query,
            k=flat(k),
            v=flat(v),
            cu_seqlens_q=call.query_starts,
            cu_seqlens_k=call.kv_starts[k.shape[1]],
            max_seqlen_q=call.longest_query,
            max_seqlen_k=call.longest_kv,
            dropout_p=0.0,
            softmax_scale=spec.scale,
            causal=True,
            window_size_left=left,
            window_size_right=right,
            softcap=softcap,
            seqused_k=call.kv_lens,
        )
        return with_sinks(out, lse, sinks, head_dim_of_lse=0)


class VllmFlashAttention2Backend(FlashBackend):
    """FlashAttention-2 as vLLM's wheel carries it.

    Args:
        specs: of the layers it will serve.
        kernels: as :func:`load_vllm` returns them.
    """

    name = "vllm_flash_attn_2"
    tiles = staticmethod(flash2_tiles)

    def __init__(
        self, specs: Iterable[AttentionSpec] = (), kernels: Flash2Kernels | None = None
    ) -> None:
        super().__init__(specs)
        self._kernels = load_vllm() if kernels is None else kernels

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
        left, right = window_sizes(spec)
        softcap = spec.softcap or 0.0
        if call.decodes:
            out, lse = self._kernels.decode(
                q=query.unsqueeze(1),
                kcache=k[:, : call.longest_kv],
                vcache=v[:, : call.longest_kv],
                seqlens_k=call.kv_lens,
                cache_batch_idx=call.slots,
                softmax_scale=spec.scale,
                is_causal=True,
                window_size_left=left,
                window_size_right=right,
                softcap=softcap,
                num_splits=0,
            )
            return with_sinks(out.squeeze(1), lse.squeeze(-1), sinks, head_dim_of_lse=1)
        out, lse, *_ = self._kernels.chunks(
            q=query,
            k=flat(k),
            v=flat(v),
            cu_seqlens_q=call.query_starts,
            cu_seqlens_k=call.kv_starts[k.shape[1]],
            seqused_k=call.kv_lens,
            max_seqlen_q=call.longest_query,
            max_seqlen_k=call.longest_kv,
            p_dropout=0.0,
            softmax_scale=spec.scale,
            is_causal=True,
            window_size_left=left,
            window_size_right=right,
            softcap=softcap,
            num_splits=0,
        )
        return with_sinks(out, lse, sinks, head_dim_of_lse=0)
