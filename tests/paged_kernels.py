"""Stand-ins for paged kernels, with the signatures of the real ones.

As in ``tests.attention_kernels``, each computes attention from nothing but its arguments: blocks, a
table, lengths. What is behind a sequence's last token is finite garbage, block 0's content as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.attention_kernels import VLLM_FA2_KVCACHE, VLLM_FA2_VARLEN, VLLM_FA3, Recorder


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
