"""Stand-ins for the wrappers of FlashInfer 0.2.14, with their signatures, as they are called."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.paged_kernels import PagedRecorder


class Wrapper:
    """What both share: a plan that is checked, and attention by it."""

    recorder: PagedRecorder
    kind: str
    masks: dict[str, Any]
    dtype: torch.dtype

    def _plan(self, queries: Any, indptr: Any, indices: Any, last: Any, page: int) -> None:
        for tensor in (queries, indptr, indices, last):
            # Lengths are read on the host, whatever device they are on.
            assert tensor.device.type == "cpu"
            assert tensor.dtype == torch.int32
        counts = indptr.diff()
        assert counts.min() >= 1
        assert 1 <= int(last.min()) <= int(last.max()) <= page
        assert len(indices) == int(indptr[-1])
        self.queries, self.page, self.indptr, self.indices = queries, page, indptr, indices
        self.lens = ((counts - 1) * page + last).to(torch.int32)

    def run(  # type: ignore[no-untyped-def]
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None,
    ):  # fmt: skip
        k, v = paged_kv_cache
        assert k.shape[1] == self.page
        assert q.is_contiguous()
        assert q.dtype == k.dtype == self.dtype
        self.recorder.record(self.kind, {"k": k, "v": v})
        keys = []
        for i in range(len(self.lens)):
            row = self.indices[int(self.indptr[i]) : int(self.indptr[i + 1])].long()
            keys.append((k[row].flatten(0, 1), v[row].flatten(0, 1)))
        bounds = self.queries.tolist()
        rows = [q[a:b] for a, b in itertools.pairwise(bounds)]
        outs, _ = self.recorder.attend(rows, keys, self.lens, **self.masks)
        return torch.cat(outs)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    kind = "decode"

    def __init__(  # type: ignore[no-untyped-def]
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False,
        use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None, backend="auto", jit_args=None,
    ):  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        assert (kv_layout, use_cuda_graph) == ("NHD", False)
        self.use_tensor_cores = use_tensor_cores

    def plan(  # type: ignore[no-untyped-def]
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None, data_type=None, sm_scale=None,
        rope_scale=None, rope_theta=None, non_blocking=True, block_tables=None, seq_lens=None,
    ):  # fmt: skip
        self.recorder.record("plan", {})
        assert self.use_tensor_cores == (num_qo_heads // num_kv_heads >= 4)
        queries = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(queries, indptr, indices, last_page_len, page_size)
        self.masks = {
            "scale": sm_scale, "causal": False, "left": window_left, "right": -1,
            "softcap": logits_soft_cap,
        }  # fmt: skip
        self.dtype = q_data_type


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    kind = "chunks"

    def __init__(  # type: ignore[no-untyped-def]
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False,
        qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None,
        backend="auto", jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph) == ("NHD", False)

    def plan(  # type: ignore[no-untyped-def]
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
        num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None,
        custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
    ):  # fmt: skip
        self.recorder.record("plan", {})
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self.masks = {
            "scale": sm_scale, "causal": causal, "left": window_left, "right": -1,
            "softcap": logits_soft_cap,
        }  # fmt: skip
        self.dtype = q_data_type


def flashinfer(recorder: PagedRecorder) -> tuple[Any, Any]:
    """Its wrapper classes; ``recorder.calls`` has their plans, too."""
    kinds = (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)
    decode, prefill = (type(kind.__name__, (kind,), {"recorder": recorder}) for kind in kinds)
    return decode, prefill
