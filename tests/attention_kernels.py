"""Stand-ins for FlashAttention's kernels, with their signatures, that record what they are given.

Each computes attention from nothing but its arguments: addresses and strides of K and V, offsets,
lengths. Like the kernels it loads whole tiles and multiplies what is masked, so NaN within a tile
would spread, and memory that is not mapped there would fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vattn.attention.flash import FlashBackend
from vattn.attention.flash_attn import FlashAttention2Backend, VllmFlashAttention2Backend
from vattn.attention.flash_attn_3 import FlashAttention3Backend, VllmFlashAttention3Backend
from vattn.attention.torch_flash import TorchFlashBackend

# As the wheels of vLLM 0.25 register them.
VLLM_FA2_VARLEN = (
    "varlen_fwd(Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q, Tensor "
    "cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? "
    "alibi_slopes, int max_seqlen_q, int max_seqlen_k, float p_dropout, float softmax_scale, bool "
    "zero_tensors, bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "bool return_softmax, int num_splits, Generator? gen) -> Tensor[]"
)
VLLM_FA2_KVCACHE = (
    "fwd_kvcache(Tensor! q, Tensor kcache, Tensor vcache, Tensor? k, Tensor? v, Tensor? seqlens_k, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? "
    "block_table, Tensor? alibi_slopes, Tensor!? out, float softmax_scale, bool is_causal, int "
    "window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, int "
    "num_splits) -> Tensor[]"
)
VLLM_FA3 = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? "
    "kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? "
    "seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, "
    "bool is_causal, int window_size_left, int window_size_right, float softcap, bool "
    "is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int "
    "sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> "
    "Tensor[]"
)


@dataclass
class Recorder:
    """What the kernels were given, and how many tokens they load at once."""

    tiles: Sequence[int] = (1,)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    appended: int = 0  # tokens whose K and V the kernels wrote

    def record(self, name: str, arguments: dict[str, Any]) -> None:
        arguments.pop("self", None)
        self.calls.append((name, arguments))

    def attend(
        self,
        queries: Sequence[torch.Tensor],
        keys: Sequence[tuple[torch.Tensor, torch.Tensor]],
        lens: torch.Tensor,
        *,
        scale: float,
        causal: bool,
        left: int,
        right: int,
        softcap: float,
        sinks: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Output ``[n, heads, d]`` and log-sum-exp ``[heads, n]`` per sequence.

        ``keys`` begin where the sequence's slot does, and reach as far as the kernel could.
        """
        assert lens.dtype == torch.int32
        assert lens.is_contiguous()
        if causal:
            right = 0
        outs, lses = [], []
        for query, (k, v), tokens in zip(queries, keys, lens.tolist(), strict=True):
            n, heads, _ = query.shape
            # Whole tiles are loaded, and what they hold is multiplied.
            ends = [min(-(-tokens // tile) * tile, len(k)) for tile in self.tiles]
            since = 0 if left < 0 else max(0, tokens - n - left)
            begin = min(since // tile * tile for tile in self.tiles)
            spread = sum((x[begin : max(ends)].double() * 0).sum() for x in (k, v))
            group = heads // k.shape[1]
            key, value = (x[begin:tokens].double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("nhd,lhd->hnl", query.double(), key) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            at = torch.arange(tokens - n, tokens)[:, None]
            seen = torch.arange(begin, tokens)[None]
            hidden = torch.zeros(n, tokens - begin, dtype=torch.bool)
            if right >= 0:
                hidden |= seen > at + right
            if left >= 0:
                hidden |= seen < at - left
            scores = scores.masked_fill(hidden, -torch.inf)
            lse = scores.logsumexp(-1)
            if sinks is not None:
                assert sinks.dtype == torch.bfloat16
                lse = torch.logaddexp(lse, sinks.double()[:, None])
            out = torch.einsum("hnl,lhd->nhd", (scores - lse[..., None]).exp(), value)
            outs.append((out + spread).to(query.dtype))
            lses.append(lse.float())
        return outs, lses

    # The entrances: slots by index, or by offsets into one long tensor ---------------------------

    def kvcache(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lens: Any,
        index: Any,
        new: Sequence[torch.Tensor | None] = (None, None),
        least: int = 1,
        **kw: Any,
    ) -> list[torch.Tensor]:
        """``q [n, 1, heads, d]``: output like it, log-sum-exp ``[n, heads, 1]``.

        ``new``: K and V to be written first, after ``lens`` tokens; they are seen, too. With them
        the kernel wants to be shown ``least`` tokens of the cache.
        """
        self._check_kv(k, v, 4)
        longest = int(lens.max())
        if new[0] is not None:
            longest = max(longest + 1, least)
            lens = self._append(k, v, lens, index, new)
        assert longest == k.shape[1]
        slots = [(k[i], v[i]) for i in index.tolist()]
        outs, lses = self.attend(list(q), self._whole(slots, k, v, index), lens, **kw)
        return [torch.stack(outs), torch.stack(lses)]

    def _append(
        self, k: torch.Tensor, v: torch.Tensor, lens: Any, index: Any, new: Sequence[Any]
    ) -> torch.Tensor:
        """Writes behind the last token of each sequence; returns the lengths that follow."""
        assert lens.dtype == index.dtype == torch.int32
        for cache, values in zip((k, v), new, strict=True):
            assert values.shape == (len(index), 1, *k.shape[2:])
            assert values.dtype == cache.dtype
            # Read 16 bytes at a time, or by TMA.
            assert values.stride(-1) == 1
            for bytes_ in (values.data_ptr(), *(n * values.itemsize for n in values.stride()[:-1])):
                assert bytes_ % 16 == 0
            for i, slot, at in zip(range(len(index)), index.tolist(), lens.tolist(), strict=True):
                cache[slot, at] = values[i, 0]
        self.appended += len(index)
        longer: torch.Tensor = lens + 1
        return longer

    def packed_kvcache(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        lens: Any,
        index: Any,
        **kw: Any,
    ) -> list[torch.Tensor]:
        """``q [T, heads, d]``: output like it, log-sum-exp ``[heads, T]``."""
        self._check_kv(k, v, 4)
        slots = [(k[i], v[i]) for i in index.tolist()]
        queries = self._queries(q, starts, longest)
        outs, lses = self.attend(queries, self._whole(slots, k, v, index), lens, **kw)
        return [torch.cat(outs), torch.cat(lses, 1)]

    def flat(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts: torch.Tensor,
        k_starts: torch.Tensor,
        longest: tuple[int, int],
        lens: Any,
        **kw: Any,
    ) -> list[torch.Tensor]:
        """``q [T, heads, d]``: output like it, log-sum-exp ``[heads, T]``."""
        self._check_kv(k, v, 3)
        assert k_starts.dtype == torch.int32
        assert k_starts.shape == starts.shape
        assert longest[1] == int(lens.max())
        keys = [(k[i:], v[i:]) for i in k_starts.tolist()[:-1]]
        outs, lses = self.attend(self._queries(q, starts, longest[0]), keys, lens, **kw)
        return [torch.cat(outs), torch.cat(lses, 1)]

    def _whole(
        self, slots: list[Any], k: torch.Tensor, v: torch.Tensor, index: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of slots beyond the cut at the longest sequence: a tile may reach further."""
        assert index.dtype == torch.int32
        assert index.is_contiguous()
        assert len(slots) == len(index)
        room = max(-(-k.shape[1] // tile) * tile for tile in self.tiles)

        def whole(x: torch.Tensor, i: int) -> torch.Tensor:
            return x.as_strided((room, *x.shape[2:]), x.stride()[1:], x[i].storage_offset())

        return [(whole(k, i), whole(v, i)) for i in index.tolist()]

    @staticmethod
    def _queries(q: torch.Tensor, starts: torch.Tensor, longest: int) -> list[torch.Tensor]:
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        bounds = starts.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(q)
        queries = [q[a:b] for a, b in itertools.pairwise(bounds)]
        assert longest == max(map(len, queries))
        return queries

    @staticmethod
    def _check_kv(k: torch.Tensor, v: torch.Tensor, dims: int) -> None:
        assert k.dim() == v.dim() == dims
        assert k.shape == v.shape
        assert k.stride(-1) == v.stride(-1) == 1


# Signatures ---------------------------------------------------------------------------------------


def flash2_package(recorder: Recorder) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``flash_attn_with_kvcache`` and ``_flash_attn_varlen_forward`` of flash_attn 2.8."""

    def flash_attn_with_kvcache(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        recorder.record("decode", {"k": k_cache, "v": v_cache})
        assert (num_splits, return_softmax_lse) == (0, True)
        return tuple(
            recorder.kvcache(
                q, k_cache, v_cache, cache_seqlens, cache_batch_idx, (k, v),
                _check_grouped(q, k_cache, k, window_size[0]), scale=softmax_scale,
                causal=causal, left=window_size[0], right=window_size[1], softcap=softcap,
            )
        )  # fmt: skip

    def _flash_attn_varlen_forward(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
        zero_tensors=False,
    ):  # fmt: skip
        recorder.record("chunks", {"k": k, "v": v})
        assert dropout_p == 0
        out, lse = recorder.flat(
            q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), seqused_k,
            scale=softmax_scale, causal=causal, left=window_size_left, right=window_size_right,
            softcap=softcap,
        )  # fmt: skip
        return out, lse, torch.empty(0), torch.empty(2)

    return flash_attn_with_kvcache, _flash_attn_varlen_forward


def _check_grouped(q: torch.Tensor, cache: torch.Tensor, new: Any, left: int) -> int:
    """FlashAttention-2's condition on the cache it is shown when it appends; see flash_attn.py."""
    group = q.shape[2] // cache.shape[2]
    if new is not None and left < 0 and group > cache.shape[1]:
        raise RuntimeError("If key is supplied, it must have seqlen <= the seqlen of the KV cache")
    return group


def flash3_package(recorder: Recorder) -> Callable[..., Any]:
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
        recorder.record("chunks" if q.dim() == 3 else "decode", {"k": k_cache, "v": v_cache})
        assert (num_splits, return_softmax_lse) == (0, True)
        return tuple(
            _flash3(
                recorder, q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, (k, v), cache_seqlens,
                cache_batch_idx, scale=softmax_scale, causal=causal, left=window_size[0],
                right=window_size[1], softcap=softcap,
            )
        )  # fmt: skip

    return flash_attn_with_kvcache


def _flash3(
    recorder: Recorder, q: torch.Tensor, k: Any, v: Any, starts: Any, longest: Any, new: Any,
    lens: Any, index: Any, **kw: Any,
) -> list[torch.Tensor]:  # fmt: skip
    if starts is None:
        return recorder.kvcache(q, k, v, lens, index, new, **kw)
    assert new == (None, None)
    return recorder.packed_kvcache(q, k, v, starts, longest, lens, index, **kw)


def _torch(recorder: Recorder) -> Callable[..., Any]:
    def forward(  # type: ignore[no-untyped-def]
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
        seqused_k=None, **unused,
    ):  # fmt: skip
        recorder.record("decode" if max_q == 1 else "chunks", {"k": key, "v": value})
        assert (dropout_p, return_debug_mask) == (0, False)
        assert not any(value is not None for value in unused.values())
        out, lse = recorder.flat(
            query, key, value, cum_seq_q, cum_seq_k, (max_q, max_k), seqused_k, scale=scale,
            causal=is_causal, left=window_size_left, right=window_size_right, softcap=0.0,
        )  # fmt: skip
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    return forward


def _vllm_varlen(recorder: Recorder) -> Callable[..., Any]:
    def varlen_fwd(  # type: ignore[no-untyped-def]
        q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes,
        max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal,
        window_size_left, window_size_right, softcap, return_softmax, num_splits, gen,
    ):  # fmt: skip
        recorder.record("chunks", {"k": k, "v": v})
        assert (out, leftpad_k, block_table, alibi_slopes, gen) == (None,) * 5
        assert (p_dropout, zero_tensors, return_softmax, num_splits) == (0, False, False, 0)
        return recorder.flat(
            q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), seqused_k,
            scale=softmax_scale, causal=is_causal, left=window_size_left,
            right=window_size_right, softcap=softcap,
        )  # fmt: skip

    return varlen_fwd


def _vllm_kvcache(recorder: Recorder) -> Callable[..., Any]:
    def fwd_kvcache(  # type: ignore[no-untyped-def]
        q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k,
        block_table, alibi_slopes, out, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, is_rotary_interleaved, num_splits,
    ):  # fmt: skip
        recorder.record("decode", {"k": kcache, "v": vcache})
        assert (rotary_cos, rotary_sin, leftpad_k, block_table) == (None,) * 4
        assert (alibi_slopes, out, num_splits) == (None, None, 0)
        return recorder.kvcache(
            q, kcache, vcache, seqlens_k, cache_batch_idx, (k, v),
            _check_grouped(q, kcache, k, window_size_left), scale=softmax_scale, causal=is_causal,
            left=window_size_left, right=window_size_right, softcap=softcap,
        )  # fmt: skip

    return fwd_kvcache


def _vllm_flash3(recorder: Recorder) -> Callable[..., Any]:
    def fwd(q, k, v, *others):  # type: ignore[no-untyped-def]
        names = [part.split()[-1] for part in VLLM_FA3.split("(")[1].split(")")[0].split(",")]
        given = dict(zip(names[3:], others, strict=True))
        recorder.record("chunks" if q.dim() == 3 else "decode", {"k": k, "v": v})
        used = ("cu_seqlens_q", "max_seqlen_q", "seqused_k", "kv_batch_idx")
        new = (given.pop("k_new"), given.pop("v_new"))
        switches = {
            "is_rotary_interleaved": True, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
            "num_splits": 0,
        }  # fmt: skip
        kept = {
            "softmax_scale": "scale", "is_causal": "causal", "window_size_left": "left",
            "window_size_right": "right", "softcap": "softcap", "s_aux": "sinks",
        }  # fmt: skip
        for name, value in given.items():
            if name not in used and name not in kept:
                assert value == switches.get(name), name
        kw = {to: given[name] for name, to in kept.items()}
        starts, longest, lens, index = (given[name] for name in used)
        return _flash3(recorder, q, k, v, starts, longest, new, lens, index, **kw)

    return fwd


# Backends -----------------------------------------------------------------------------------------

BACKENDS: tuple[type[FlashBackend], ...] = (
    TorchFlashBackend,
    FlashAttention2Backend,
    VllmFlashAttention2Backend,
    FlashAttention3Backend,
    VllmFlashAttention3Backend,
)


@contextmanager
def operators(recorder: Recorder) -> Iterator[dict[str, Any]]:
    """Operators with the schemas of the real ones, by their names."""
    schema = str(torch.ops.aten._flash_attention_forward.default._schema)
    schemas = {
        "_flash_attention_forward": (schema.removeprefix("aten::"), _torch),
        "varlen_fwd": (VLLM_FA2_VARLEN, _vllm_varlen),
        "fwd_kvcache": (VLLM_FA2_KVCACHE, _vllm_kvcache),
        "fwd": (VLLM_FA3, _vllm_flash3),
    }
    with torch.library._scoped_library("vattn_stand_in", "DEF") as library:
        for name, (text, make) in schemas.items():
            library.define(text)
            library.impl(name, make(recorder), "CompositeExplicitAutograd")
        yield {name: getattr(torch.ops.vattn_stand_in, name).default for name in schemas}
