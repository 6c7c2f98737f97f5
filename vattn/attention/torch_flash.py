"""PyTorch's own FlashAttention-2, in the flat form."""

from __future__ import annotations

import torch

from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New, flat, window_sizes, with_sinks
from vattn.attention.flash_attn import flash2_tiles
from vattn.attention.flash_calls import Call
from vattn.attention.operators import Kernel, bind

_PASSED = (
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale "
    "window_size_left window_size_right seqused_k"
)


def load() -> Kernel:
    """The operator of this PyTorch.

    Raises:
        Unavailable: it takes other arguments than we know.
    """
    name = "aten::_flash_attention_forward"
    return bind(name, torch.ops.aten._flash_attention_forward.default, _PASSED)


class TorchFlashBackend(FlashBackend):
    """``aten::_flash_attention_forward``: needs nothing but PyTorch.

    It splits long sequences over the GPU for one-token queries of grouped heads without a window.
    """

    name = "torch"
    has_softcap = False
    tiles = staticmethod(flash2_tiles)

    @staticmethod
    def load() -> Kernel:
        """See :func:`load`."""
        return load()

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
        assert new is None, "this kernel cannot append"
        left, right = window_sizes(spec)
        out, lse, *_ = self._kernel(
            query=query,
            key=flat(k),
            value=flat(v),
            cum_seq_q=call.query_starts,
            cum_seq_k=call.kv_starts[k.shape[1]],
            max_q=call.longest_query,
            max_k=call.longest_kv,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=spec.scale,
            window_size_left=left,
            window_size_right=right,
            seqused_k=call.kv_lens,
        )
        return with_sinks(out, lse, sinks, head_dim_of_lse=0)
