"""FlashAttention over block tables: the same packages and operators as ours, on their paged path.

The functions are those that ``vattn.attention`` binds, given a table in place of slots, and both
sides' split over the GPU, masks and appending are the kernel's own. What each takes of block sizes:

* ``flash_attn`` and PyTorch's own FlashAttention-2: multiples of 256 tokens;
* vLLM's build of FlashAttention-2: multiples of 16;
* FlashAttention-3: any; where a block is a multiple of the tile and a KV head has more queries
  than a tile has rows, it loads by TMA. vLLM gives it multiples of 16, and so do we.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch

from bench.paged.calls import PagedCall
from bench.paged.kernels import PagedKernel
from vattn.attention import flash_attn, flash_attn_3, torch_flash
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend, New, new_rows, window_sizes, with_sinks
from vattn.attention.flash_attn_3 import FlashAttention3Backend, VllmFlashAttention3Backend
from vattn.attention.operators import (
    Kernel,
    Unavailable,
    library_operator,
    python_function,
    takes,
)


class FlashKernel(PagedKernel):
    """What the FlashAttention kernels share.

    Args:
        kernel: as :meth:`load` returns it, which is what None stands for.
    """

    # Says on which devices and for which layers the kernel works; the same for its paged path.
    contiguous: ClassVar[type[FlashBackend]]

    def __init__(self, kernel: Any = None) -> None:
        self._kernel = self.load() if kernel is None else kernel
        self.appends = bool(getattr(self._kernel, "appends", False))

    @classmethod
    def create(cls, specs: Sequence[AttentionSpec], device: torch.device) -> Self:
        """See :meth:`PagedKernel.create`."""
        kernel = cls()
        if kernel.appends:
            kernel.appends = kernel.was_built_to_append(specs[0], device)
        return kernel

    @classmethod
    @abc.abstractmethod
    def load(cls) -> Any:
        """The functions of the kernel, after checking that they take a block table.

        Raises:
            Unavailable: it is not installed, or takes other arguments than we know.
        """

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """See :meth:`PagedKernel.refusal`."""
        return cls.contiguous.refusal(spec, device)

    @classmethod
    def tile_tokens(cls, spec: AttentionSpec) -> tuple[int, ...]:
        """See :meth:`PagedKernel.tile_tokens`."""
        return cls.contiguous.tiles(spec.head_dim)

    def was_built_to_append(self, spec: AttentionSpec, device: torch.device) -> bool:
        """Whether the kernel that takes new K and V does write them; see FlashAttention-3."""
        del spec, device
        return True


def _wants_table(name: str, function: Kernel, argument: str) -> None:
    """Refuses a function without the argument for block tables."""
    if not takes(function, argument):
        raise Unavailable(f"{name} has no argument {argument}")


# FlashAttention-2 ---------------------------------------------------------------------------------


class PagedFlash2(FlashKernel):
    """The package ``flash_attn``."""

    name = "fa2"
    block_multiple = 256
    contiguous = flash_attn.FlashAttention2Backend
    _kernel: flash_attn.Flash2Kernels

    @classmethod
    def load(cls) -> flash_attn.Flash2Kernels:
        """See :meth:`FlashKernel.load`."""
        for name in ("flash_attn_with_kvcache", "_flash_attn_varlen_forward"):
            function = python_function("flash_attn.flash_attn_interface", name)
            _wants_table(name, function, "block_table")
        return flash_attn.load_package()

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
        common: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "window": window_sizes(spec),
            "softcap": spec.softcap or 0.0,
            "block_table": call.table,
        }
        if not call.decodes:
            out, lse, *_ = self._kernel.chunks(
                q=query,
                k=k,
                v=v,
                cu_seqlens_q=call.query_starts,
                # Has to be there and has to have this shape; lengths come from seqused_k.
                cu_seqlens_k=call.query_starts,
                max_seqlen_q=call.longest_query,
                max_seqlen_k=call.longest_kv,
                seqused_k=call.kv_lens,
                **common,
            )
            return with_sinks(out, lse, sinks, head_dim_of_lse=0)
        out, lse = self._kernel.decode(
            q=query.unsqueeze(1),
            k_cache=k,
            v_cache=v,
            cache_seqlens=call.kv_lens if new is None else call.past_lens,
            cache_batch_idx=None,
            num_splits=0,
            **new_rows(new),
            **common,
        )
        return with_sinks(out.squeeze(1), lse.squeeze(-1), sinks, head_dim_of_lse=1)


class PagedVllmFlash2(PagedFlash2):
    """FlashAttention-2 as vLLM's wheel carries it, changed there to take smaller blocks."""

    name = "vllm-fa2"
    block_multiple = 16
    contiguous = flash_attn.VllmFlashAttention2Backend

    @classmethod
    def load(cls) -> flash_attn.Flash2Kernels:
        """See :meth:`FlashKernel.load`."""
        for name in ("fwd_kvcache", "varlen_fwd"):
            place = ("vllm", "vllm_flash_attn/_vllm_fa2_C*.so", "_vllm_fa2_C", name)
            _wants_table(name, library_operator(*place), "block_table")
        return flash_attn.load_vllm()


class PagedTorch(FlashKernel):
    """``aten::_flash_attention_forward``, which ``torch.nn.attention.varlen.varlen_attn`` calls.

    Called as ours is, beneath the public function: that one would allocate one more tensor per call
    and knows no window below another length than its causal one.
    """

    name = "torch"
    block_multiple = 256
    contiguous = torch_flash.TorchFlashBackend
    _kernel: Kernel

    @classmethod
    def load(cls) -> Kernel:
        """See :meth:`FlashKernel.load`."""
        name = "aten::_flash_attention_forward"
        operator = torch.ops.aten._flash_attention_forward.default
        _wants_table(f"{name} of torch {torch.__version__}", operator, "block_table")
        return torch_flash.load()

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
        assert new is None, "this kernel cannot append"
        left, right = window_sizes(spec)
        out, lse, *_ = self._kernel(
            query=query,
            key=k,
            value=v,
            cum_seq_q=call.query_starts,
            cum_seq_k=call.query_starts,  # see PagedFlash2
            max_q=call.longest_query,
            max_k=call.longest_kv,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=spec.scale,
            window_size_left=left,
            window_size_right=right,
            seqused_k=call.kv_lens,
            block_table=call.table,
        )
        return with_sinks(out, lse, sinks, head_dim_of_lse=0)


# FlashAttention-3 ---------------------------------------------------------------------------------


class PagedFlash3(FlashKernel):
    """The package ``flash_attn_interface``."""

    name = "fa3"
    block_multiple = 16
    contiguous = FlashAttention3Backend
    _kernel: flash_attn_3.Flash3Kernel

    @classmethod
    def load(cls) -> flash_attn_3.Flash3Kernel:
        """See :meth:`FlashKernel.load`."""
        name = "flash_attn_with_kvcache"
        _wants_table(name, python_function("flash_attn_interface", name), "page_table")
        return flash_attn_3.load_package()

    def was_built_to_append(self, spec: AttentionSpec, device: torch.device) -> bool:
        """Whether it is; a build may take the arguments and have left appending out."""
        kind = type(self).contiguous
        assert issubclass(kind, FlashAttention3Backend)
        return kind([spec], self._kernel).was_built_to_append(spec, device)

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
        given: dict[str, Any] = new_rows(new)
        if self._kernel.knows_sinks:
            given["sinks"] = None if sinks is None else sinks.to(torch.bfloat16)
        out: torch.Tensor
        out, lse, *_ = self._kernel.forward(
            q=query.unsqueeze(1) if call.decodes else query,
            k_cache=k,
            v_cache=v,
            cache_seqlens=call.kv_lens if new is None else call.past_lens,
            cache_batch_idx=None,
            cu_seqlens_q=None if call.decodes else call.query_starts,
            max_seqlen_q=None if call.decodes else call.longest_query,
            softmax_scale=spec.scale,
            window=window_sizes(spec),
            softcap=spec.softcap or 0.0,
            num_splits=0,
            page_table=call.table,
            **given,
        )
        if call.decodes:
            out, lse = out.squeeze(1), lse.squeeze(-1)
        if self._kernel.knows_sinks:
            return out
        return with_sinks(out, lse, sinks, head_dim_of_lse=int(call.decodes))


class PagedVllmFlash3(PagedFlash3):
    """FlashAttention-3 as vLLM's wheel carries it; it knows attention sinks itself."""

    name = "vllm-fa3"
    contiguous = VllmFlashAttention3Backend

    @classmethod
    def load(cls) -> flash_attn_3.Flash3Kernel:
        """See :meth:`FlashKernel.load`."""
        place = ("vllm", "vllm_flash_attn/_vllm_fa3_C*.so", "_vllm_fa3_C", "fwd")
        _wants_table("fwd", library_operator(*place), "page_table")
        return flash_attn_3.load_vllm()
