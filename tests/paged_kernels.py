"""Stand-ins for paged kernels, with the signatures of the real ones, and a world of block tables.

As in ``tests.attention_kernels``, each computes attention from nothing but its arguments: blocks, a
table, lengths. What is behind a sequence's last token is finite garbage, block 0's content as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.paged.backends import PagedBackend
from bench.paged.cache import PagedCache
from tests.attention_kernels import VLLM_FA2_KVCACHE, VLLM_FA2_VARLEN, VLLM_FA3, Recorder
from tests.attention_reference import GARBAGE, World
from vattn.attention.base import AttentionSpec, Step
from vattn.kv.layout import LayerSpec


class PagedRecorder(Recorder):
    """Reads blocks where a table says; see :class:`tests.attention_kernels.Recorder`."""

    multiple = 1  # of tokens, that the kernel wants blocks to be

    def pages(
        self, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, longest: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each sequence up to the end of its last block."""
        self._check_kv(k, v, 4)
        block = k.shape[1]
        if block % self.multiple:
            raise RuntimeError(f"Paged KV cache block size must be divisible by {self.multiple}")
        assert table.dtype == torch.int32
        assert table.stride(-1) == 1
        # The width is what kernels split the work by: not wider than it has to be.
        assert table.shape[1] == -(-longest // block)
        return [(k[row.long()].flatten(0, 1), v[row.long()].flatten(0, 1)) for row in table]

    def paged_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lens: torch.Tensor,
        table: torch.Tensor,
        new: Sequence[Any] = (None, None),
        **kw: Any,
    ) -> list[torch.Tensor]:
        """``q [n, 1, heads, d]``: output like it, log-sum-exp ``[n, heads, 1]``."""
        if new[0] is not None:
            lens = self._append_to_blocks(k, v, lens, table, new)
        keys = self.pages(k, v, table, int(lens.max()))
        outs, lses = self.attend(list(q), keys, lens, **kw)
        return [torch.stack(outs), torch.stack(lses)]

    def _append_to_blocks(
        self, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, table: Any, new: Sequence[Any]
    ) -> torch.Tensor:
        block = k.shape[1]
        for cache, values in zip((k, v), new, strict=True):
            assert values.shape == (len(table), 1, *k.shape[2:])
            assert values.stride(-1) == 1
            for i, at in enumerate(lens.tolist()):
                cache[table[i, at // block], at % block] = values[i, 0]
        self.appended += len(table)
        longer: torch.Tensor = lens + 1
        return longer

    def paged_packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor,
        longest: tuple[int, int | None],
        lens: torch.Tensor,
        table: torch.Tensor,
        **kw: Any,
    ) -> list[torch.Tensor]:
        """``q [T, heads, d]``: output like it, log-sum-exp ``[heads, T]``."""
        assert longest[1] in (None, int(lens.max()))
        keys = self.pages(k, v, table, int(lens.max()))
        outs, lses = self.attend(self._queries(q, starts, longest[0]), keys, lens, **kw)
        return [torch.cat(outs), torch.cat(lses, 1)]


# Signatures ---------------------------------------------------------------------------------------


def flash2_package(recorder: PagedRecorder) -> dict[str, Callable[..., Any]]:
    """The two functions of flash_attn 2.8."""

    def flash_attn_with_kvcache(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        recorder.record("decode", {"k": k_cache, "v": v_cache, "table": block_table})
        assert (num_splits, return_softmax_lse, cache_batch_idx) == (0, True, None)
        return tuple(
            recorder.paged_decode(
                q, k_cache, v_cache, cache_seqlens, block_table, (k, v), scale=softmax_scale,
                causal=causal, left=window_size[0], right=window_size[1], softcap=softcap,
            )
        )  # fmt: skip

    def _flash_attn_varlen_forward(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
        zero_tensors=False,
    ):  # fmt: skip
        recorder.record("chunks", {"k": k, "v": v, "table": block_table})
        assert dropout_p == 0
        assert cu_seqlens_k.shape == cu_seqlens_q.shape
        out, lse = recorder.paged_packed(
            q, k, v, cu_seqlens_q, (max_seqlen_q, max_seqlen_k), seqused_k, block_table,
            scale=softmax_scale, causal=causal, left=window_size_left, right=window_size_right,
            softcap=softcap,
        )  # fmt: skip
        return out, lse, torch.empty(0), torch.empty(2)

    return {f.__name__: f for f in (flash_attn_with_kvcache, _flash_attn_varlen_forward)}


def flash3_package(recorder: PagedRecorder) -> Callable[..., Any]:
    """``flash_attn_with_kvcache`` of flash_attn_interface."""

    def flash_attn_with_kvcache(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
        cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
        q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        if cache_batch_idx is not None:  # FlashBackend asks whether it was built to append
            return q, torch.zeros(len(q), q.shape[2], 1)
        recorder.record(
            "chunks" if q.dim() == 3 else "decode",
            {"k": k_cache, "v": v_cache, "table": page_table},
        )
        assert (num_splits, return_softmax_lse) == (0, True)
        return tuple(
            _flash3(
                recorder, q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, (k, v), cache_seqlens,
                page_table, scale=softmax_scale, causal=causal, left=window_size[0],
                right=window_size[1], softcap=softcap,
            )
        )  # fmt: skip

    return flash_attn_with_kvcache


def _flash3(
    recorder: PagedRecorder, q: torch.Tensor, k: Any, v: Any, starts: Any, longest: Any, new: Any,
    lens: Any, table: Any, **kw: Any,
) -> list[torch.Tensor]:  # fmt: skip
    if starts is None:
        return recorder.paged_decode(q, k, v, lens, table, new, **kw)
    assert new == (None, None)
    return recorder.paged_packed(q, k, v, starts, (longest, None), lens, table, **kw)


def _arguments(schema: str, given: Sequence[Any], *, but: str, neutral: dict[str, Any]) -> Any:
    """An operator's arguments by name, after checking that those not in ``but`` are unused."""
    names = [part.split()[-1] for part in schema.split("(")[1].split(")")[0].split(", ")]
    named = dict(zip(names, given, strict=True))
    for name, value in named.items():
        if name not in but.split():
            assert value == neutral.get(name), name
    return named


def _vllm_varlen(recorder: PagedRecorder) -> Callable[..., Any]:
    def varlen_fwd(*given: Any) -> Any:
        a = _arguments(
            VLLM_FA2_VARLEN.replace("!", ""),
            given,
            but="q k v cu_seqlens_q cu_seqlens_k seqused_k block_table max_seqlen_q max_seqlen_k "
            "softmax_scale is_causal window_size_left window_size_right softcap",
            neutral={
                "p_dropout": 0.0,
                "zero_tensors": False,
                "return_softmax": False,
                "num_splits": 0,
            },
        )
        recorder.record("chunks", {"k": a["k"], "v": a["v"], "table": a["block_table"]})
        return recorder.paged_packed(
            a["q"],
            a["k"],
            a["v"],
            a["cu_seqlens_q"],
            (a["max_seqlen_q"], a["max_seqlen_k"]),
            a["seqused_k"],
            a["block_table"],
            **_masks(a),
        )

    return varlen_fwd


def _vllm_kvcache(recorder: PagedRecorder) -> Callable[..., Any]:
    def fwd_kvcache(*given: Any) -> Any:
        a = _arguments(
            VLLM_FA2_KVCACHE.replace("!", ""),
            given,
            but="q kcache vcache k v seqlens_k block_table softmax_scale is_causal "
            "window_size_left window_size_right softcap",
            neutral={"is_rotary_interleaved": True, "num_splits": 0},
        )
        recorder.record("decode", {"k": a["kcache"], "v": a["vcache"], "table": a["block_table"]})
        return recorder.paged_decode(
            a["q"],
            a["kcache"],
            a["vcache"],
            a["seqlens_k"],
            a["block_table"],
            (a["k"], a["v"]),
            **_masks(a),
        )

    return fwd_kvcache


def _vllm_flash3(recorder: PagedRecorder) -> Callable[..., Any]:
    def fwd(*given: Any) -> Any:
        asks = given[15] is not None  # kv_batch_idx: see flash3_package
        if asks:
            return [given[0], torch.zeros(len(given[0]), given[0].shape[2], 1)]
        a = _arguments(
            VLLM_FA3.replace("!", ""),
            given,
            but="q k v k_new v_new cu_seqlens_q seqused_k max_seqlen_q page_table softmax_scale "
            "is_causal window_size_left window_size_right softcap s_aux",
            neutral={
                "is_rotary_interleaved": True,
                "sm_margin": 0,
                "cp_world_size": 1,
                "cp_rank": 0,
                "num_splits": 0,
            },
        )
        kind = "chunks" if a["q"].dim() == 3 else "decode"
        recorder.record(kind, {"k": a["k"], "v": a["v"], "table": a["page_table"]})
        return _flash3(
            recorder,
            a["q"],
            a["k"],
            a["v"],
            a["cu_seqlens_q"],
            a["max_seqlen_q"],
            (a["k_new"], a["v_new"]),
            a["seqused_k"],
            a["page_table"],
            sinks=a["s_aux"],
            **_masks(a),
        )

    return fwd


def _masks(a: dict[str, Any]) -> dict[str, Any]:
    return {
        "scale": a["softmax_scale"],
        "causal": a["is_causal"],
        "left": a["window_size_left"],
        "right": a["window_size_right"],
        "softcap": a["softcap"],
    }


def _torch(recorder: PagedRecorder) -> Callable[..., Any]:
    def forward(  # type: ignore[no-untyped-def]
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
        seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        kind = "decode" if max_q == 1 else "chunks"
        recorder.record(kind, {"k": key, "v": value, "table": block_table})
        assert (dropout_p, return_debug_mask) == (0, False)
        assert (alibi_slopes, num_splits) == (None, None)
        assert cum_seq_k.shape == cum_seq_q.shape
        out, lse = recorder.paged_packed(
            query, key, value, cum_seq_q, (max_q, max_k), seqused_k, block_table, scale=scale,
            causal=is_causal, left=window_size_left, right=window_size_right, softcap=0.0,
        )  # fmt: skip
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    return forward


@contextmanager
def operators(recorder: PagedRecorder) -> Iterator[dict[str, Any]]:
    """Operators with the schemas of the real ones, by their names."""
    schema = str(torch.ops.aten._flash_attention_forward.default._schema)
    made = {
        "_flash_attention_forward": (schema.removeprefix("aten::"), _torch),
        "varlen_fwd": (VLLM_FA2_VARLEN, _vllm_varlen),
        "fwd_kvcache": (VLLM_FA2_KVCACHE, _vllm_kvcache),
        "fwd": (VLLM_FA3, _vllm_flash3),
    }
    with torch.library._scoped_library("vattn_paged_stand_in", "DEF") as library:
        for name, (text, make) in made.items():
            library.define(text)
            library.impl(name, make(recorder), "CompositeExplicitAutograd")
        yield {name: getattr(torch.ops.vattn_paged_stand_in, name).default for name in made}


# FlashInfer 0.2.14 --------------------------------------------------------------------------------


def flashinfer(recorder: PagedRecorder) -> tuple[Any, Any]:
    """Its wrapper classes; ``recorder.calls`` has their plans, too."""

    class Wrapper:
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
            recorder.record(self.kind, {"k": k, "v": v})
            keys = []
            for i in range(len(self.lens)):
                row = self.indices[int(self.indptr[i]) : int(self.indptr[i + 1])].long()
                keys.append((k[row].flatten(0, 1), v[row].flatten(0, 1)))
            bounds = self.queries.tolist()
            rows = [q[a:b] for a, b in itertools.pairwise(bounds)]
            outs, _ = recorder.attend(rows, keys, self.lens, **self.masks)
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
            recorder.record("plan", {})
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
            recorder.record("plan", {})
            self._plan(
                qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size
            )
            self.masks = {
                "scale": sm_scale, "causal": causal, "left": window_left, "right": -1,
                "softcap": logits_soft_cap,
            }  # fmt: skip
            self.dtype = q_data_type

    return BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper


# Sequences in blocks ------------------------------------------------------------------------------


class PagedWorld(World):
    """Sequences in a cache of blocks, whose free blocks come in random order."""

    cache: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in range(len(self.specs)):
            for tensor in self.cache.layer(layer):
                tensor.fill_(GARBAGE)
        # Take every block, and give them back in another order.
        slots = [self.cache.open() for _ in range(self.cache.max_seqs)]
        for i in range(self.cache.blocks.free):
            slot = slots[i % len(slots)]
            tokens = (int(self.cache.counts[slot]) + 1) * self.cache.block_tokens
            if tokens <= self.cache.max_tokens:
                self.cache.ensure([slot], [tokens])
        random = np.random.default_rng(self.seed)
        for slot in random.permutation(slots):
            while self.cache.tokens(int(slot)):
                self.cache.truncate(
                    int(slot), max(0, self.cache.tokens(int(slot)) - self.cache.block_tokens)
                )
            self.cache.release(int(slot))

    def fork(self, slot: int, tokens: int) -> int:
        """A new sequence that shares the blocks of another's first tokens, whole ones."""
        size = self.cache.block_tokens
        assert tokens % size == 0
        index = self.open()
        blocks = self.cache.blocks_of(slot)[: tokens // size]
        self.cache.blocks.share(blocks)
        self.cache.hold(index, blocks, tokens)
        self.history[index] = [(k[:tokens], v[:tokens]) for k, v in self.history[slot]]
        return index

    def release(self, slot: int) -> None:
        self.cache.release(slot)
        del self.history[slot]

    def end(self) -> None:
        """Releases everything; no block may be left."""
        for slot in list(self.history):
            self.release(slot)
        self.cache.check()
        assert self.cache.blocks.live == 0
        self.cache.close()

    def prepare(self, decodes: Sequence[int] = (), chunks: Sequence[tuple[int, int]] = ()) -> Step:
        new = [(slot, 1) for slot in sorted(decodes)] + list(chunks)
        slots, lens = (np.array(x, np.int32) for x in zip(*new, strict=True))
        kv_lens = np.array([self.tokens(slot) for slot in slots], np.int32) + lens
        self.cache.ensure(slots, kv_lens)
        return Step(self.cache, slots, lens, kv_lens, len(decodes))


def paged_world(
    backend: PagedBackend,
    specs: Sequence[AttentionSpec],
    *,
    block_tokens: int,
    max_seqs: int = 8,
    max_tokens: int = 600,
    seed: int = 0,
) -> PagedWorld:
    """A world on a cache of its own."""
    cache = PagedCache(
        [LayerSpec(s.kv_heads, s.head_dim, s.dtype, s.window) for s in specs],
        device="cpu",
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        num_blocks=1 + max_seqs * -(-max_tokens // block_tokens),
        block_tokens=block_tokens,
    )
    return PagedWorld(backend, specs, cache, seed=seed)  # type: ignore[arg-type]
