"""FlashAttention-2: the package ``flash_attn``, and the build inside vLLM's wheel.

Decodes use the kvcache form, which splits long sequences over the GPU and writes their new K and V;
chunks use the flat form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New, flat, new_rows, window_sizes, with_sinks
from vattn.attention.flash_calls import Call
from vattn.attention.operators import Kernel, bind, library_operator, python_function, takes


def flash2_tiles(head_dim: int) -> tuple[int, ...]:
    """Tokens that FlashAttention-2 loads at once: of the split kernel, a multiple of the others'.

    It does not load past the last token, but below a window it loads the first tile whole.
    """
    return (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64,)


@dataclass(frozen=True)
class Flash2Kernels:
    """The two entrances, by the names that :meth:`FlashAttention2Backend.attend` passes.

    ``decode`` takes the kvcache form and ``chunks`` the flat form. Both return the output and the
    log-sum-exp, and ``chunks`` more. ``appends``: ``decode`` takes the new ``k`` and ``v``, too.
    """

    decode: Kernel
    chunks: Kernel
    appends: bool


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
    function = python_function(module, "flash_attn_with_kvcache")
    with_cache = bind("flash_attn_with_kvcache", function, _PACKAGE_DECODE)
    # The public function for packed batches cannot be told lengths apart from offsets.
    packed = bind(
        "_flash_attn_varlen_forward",
        python_function(module, "_flash_attn_varlen_forward"),
        _PACKAGE_CHUNKS,
    )

    def decode(window: tuple[int, int], **given: Any) -> Any:
        return with_cache(causal=True, window_size=window, return_softmax_lse=True, **given)

    def chunks(window: tuple[int, int], **given: Any) -> Any:
        left, right = window
        return packed(
            dropout_p=0.0, causal=True, window_size_left=left, window_size_right=right, **given
        )

    return Flash2Kernels(decode, chunks, takes(function, "k v"))


def load_vllm() -> Flash2Kernels:
    """The kernels of FlashAttention-2 in vLLM's wheel.

    Raises:
        Unavailable: vLLM is not installed, or its kernels take other arguments than we know.
    """
    place = ("vllm", "vllm_flash_attn/_vllm_fa2_C*.so", "_vllm_fa2_C")
    operator = library_operator(*place, "fwd_kvcache")
    with_cache = bind(
        "_vllm_fa2_C::fwd_kvcache", operator, _VLLM_DECODE, {"is_rotary_interleaved": True}
    )
    packed = bind(
        "_vllm_fa2_C::varlen_fwd",
        library_operator(*place, "varlen_fwd"),
        _VLLM_CHUNKS,
        {"zero_tensors": False, "return_softmax": False},
    )

    def decode(
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_seqlens: torch.Tensor,
        window: tuple[int, int],
        **given: Any,
    ) -> Any:
        return with_cache(
            kcache=k_cache,
            vcache=v_cache,
            seqlens_k=cache_seqlens,
            is_causal=True,
            window_size_left=window[0],
            window_size_right=window[1],
            **given,
        )

    def chunks(window: tuple[int, int], **given: Any) -> Any:
        left, right = window
        return packed(
            p_dropout=0.0,
            is_causal=True,
            window_size_left=left,
            window_size_right=right,
            num_splits=0,
            **given,
        )

    return Flash2Kernels(decode, chunks, takes(operator, "k v"))


class FlashAttention2Backend(FlashBackend):
    """The package ``flash_attn``, version 2."""

    name = "flash_attn_2"
    tiles = staticmethod(flash2_tiles)
    _kernel: Flash2Kernels

    @staticmethod
    def load() -> Flash2Kernels:
        """See :func:`load_package`."""
        return load_package()

    def can_append(self, specs: Sequence[AttentionSpec]) -> bool:
        """See :meth:`FlashBackend.can_append`."""
        # See attend(): a slot has to hold as many tokens as a KV head serves query heads.
        fits = all(s.heads // s.kv_heads <= min(self.tiles(s.head_dim)) for s in specs)
        return self._kernel.appends and fits

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
        common: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "window": window_sizes(spec),
            "softcap": spec.softcap or 0.0,
        }
        if not call.decodes:
            out, lse, *_ = self._kernel.chunks(
                q=query,
                k=flat(k),
                v=flat(v),
                cu_seqlens_q=call.query_starts,
                cu_seqlens_k=call.kv_starts[k.shape[1]],
                max_seqlen_q=call.longest_query,
                max_seqlen_k=call.longest_kv,
                seqused_k=call.kv_lens,
                **common,
            )
            return with_sinks(out, lse, sinks, head_dim_of_lse=0)
        longest = call.longest_kv
        if new is not None:
            # The query heads of a KV head become so many queries, and when it appends the kernel
            # refuses more queries than the cache that it is shown has tokens.
            longest = max(longest, spec.heads // spec.kv_heads)
        out, lse = self._kernel.decode(
            q=query.unsqueeze(1),
            k_cache=k[:, :longest],
            v_cache=v[:, :longest],
            cache_seqlens=call.kv_lens if new is None else call.past_lens,
            cache_batch_idx=call.slots,
            num_splits=0,
            **new_rows(new),
            **common,
        )
        return with_sinks(out.squeeze(1), lse.squeeze(-1), sinks, head_dim_of_lse=1)


class VllmFlashAttention2Backend(FlashAttention2Backend):
    """FlashAttention-2 as vLLM's wheel carries it."""

    name = "vllm_flash_attn_2"

    @staticmethod
    def load() -> Flash2Kernels:
        """See :func:`load_vllm`."""
        return load_vllm()
