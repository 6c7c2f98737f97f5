"""Adapters of CUDA kernels, checked on a CPU by stand-ins behind the real operators' schemas.

A stand-in computes attention from nothing but what a kernel is given: base pointers, strides, the
offsets and lengths, as pointer arithmetic. It refuses what the kernels refuse, and it reads whole
tiles of V, as FlashAttention-3 does, so NaN that a tile reaches shows.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench.kernels import KERNELS, Kernel, Missing, complete, load_kernels
from bench.layout_cells import Bench
from bench.layout_points import LayoutChoice, Model

TILES = (128, 176, 192, 224)
MODEL = Model(layers=3, heads=8, kv_heads=2, head_dim=32, dtype=torch.bfloat16)
PAGE = 16384

VARLEN = (
    "varlen_fwd(Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, "
    "Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, float p_dropout, "
    "float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool return_softmax, {last}) -> Tensor[]"
)
KVCACHE = (
    "fwd_kvcache(Tensor! q, Tensor kcache, Tensor vcache, Tensor? k, Tensor? v, "
    "Tensor? seqlens_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, "
    "Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, Tensor!? out, "
    "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
    "float softcap, bool is_rotary_interleaved, int num_splits) -> Tensor[]"
)
FA3_COMMON = (
    "Tensor? k_new{none}, Tensor? v_new{none}, Tensor? q_v{none}, Tensor? out{none}, "
    "Tensor? cu_seqlens_q{none}, Tensor? cu_seqlens_k{none}, Tensor? cu_seqlens_k_new{none}, "
    "Tensor? seqused_q{none}, Tensor? seqused_k{none}, int? max_seqlen_q{none}, "
    "int? max_seqlen_k{none}, Tensor? page_table{none}, Tensor? kv_batch_idx{none}, "
    "Tensor? leftpad_k{none}, Tensor? rotary_cos{none}, Tensor? rotary_sin{none}, "
    "Tensor? seqlens_rotary{none}, Tensor? q_descale{none}, Tensor? k_descale{none}, "
    "Tensor? v_descale{none}, "
)
FA3_VLLM = (
    "fwd(Tensor q, Tensor k, Tensor v, " + FA3_COMMON.format(none="") + "float softmax_scale, "
    "bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, "
    "int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k"
    ") -> Tensor[]"
)
FA3 = (
    "fwd(Tensor q, Tensor k, Tensor v, " + FA3_COMMON.format(none=" = None") + "float? "
    "softmax_scale = None, bool is_causal = False, int window_size_left = -1, "
    "int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor)"
)


def read(kv: torch.Tensor, start: int, token_stride: int, tokens: int) -> torch.Tensor:
    """``[tokens, heads, dim]`` from an element offset on, by the strides that a kernel gets."""
    assert kv.stride(-1) == 1, "kernels need a contiguous last dimension"
    shape = (tokens, kv.shape[-2], kv.shape[-1])
    return kv.as_strided(shape, (token_stride, kv.stride(-2), 1), kv.storage_offset() + start)


def int32(values: torch.Tensor | None, n: int) -> list[int]:
    assert values is not None
    assert values.dtype == torch.int32
    assert values.is_contiguous()
    assert values.shape == (n,)
    return [int(value) for value in values.tolist()]


@dataclass
class StandIn:
    """Attention as a kernel would do it; ``calls`` are the forms in which it was asked."""

    tile: int = 224
    calls: list[str] = field(default_factory=list)
    # Tokens by which it misreads every length: for the test of the check itself.
    wrong_by: int = 0

    def attend(
        self,
        q: torch.Tensor,  # [queries, heads, dim]
        k: torch.Tensor,
        v: torch.Tensor,
        start: tuple[int, int],
        stride: tuple[int, int],
        length: int,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        length += self.wrong_by
        covered = -(-length // self.tile) * self.tile
        keys = read(k, start[0], stride[0], length).float()
        values = read(v, start[1], stride[1], covered).float()
        queries, heads, dim = q.shape
        grouped = q.float().view(queries, keys.shape[1], -1, dim)
        scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
        if causal:
            row = torch.arange(queries)[:, None] + length - queries
            scores = scores.masked_fill(torch.arange(length)[None, :] > row, float("-inf"))
        weights = torch.zeros(*scores.shape[:-1], covered)
        weights[..., :length] = scores.softmax(-1)
        out = torch.einsum("hgqk,khd->qhgd", weights, values)
        return out.reshape(queries, heads, dim).to(q.dtype)

    def flat(
        self,
        q: torch.Tensor,  # [total, heads, dim]
        k: torch.Tensor,  # [total, kv_heads, dim]
        v: torch.Tensor,
        cu_q: torch.Tensor | None,
        cu_k: torch.Tensor | None,
        used: torch.Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        self.calls.append("flat")
        assert cu_q is not None
        batch = cu_q.numel() - 1
        starts_q, starts_k = int32(cu_q, batch + 1), int32(cu_k, batch + 1)
        lengths = int32(used, batch)
        assert max(lengths) == max_k
        assert starts_k[-1] <= k.shape[0]
        outs = []
        for i, length in enumerate(lengths):
            assert starts_q[i + 1] - starts_q[i] <= max_q
            rows = q[starts_q[i] : starts_q[i + 1]]
            start = (starts_k[i] * k.stride(0), starts_k[i] * v.stride(0))
            strides = (k.stride(0), v.stride(0))
            outs.append(self.attend(rows, k, v, start, strides, length, scale, causal))
        return torch.cat(outs)

    def kvcache(
        self,
        q: torch.Tensor,  # [batch, queries, heads, dim]
        k: torch.Tensor,  # [slots, longest, kv_heads, dim]
        v: torch.Tensor,
        lengths: torch.Tensor | None,
        slots: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        self.calls.append("kvcache")
        batch = q.shape[0]
        used, index = int32(lengths, batch), int32(slots, batch)
        assert max(used) <= k.shape[1]
        assert max(index) < k.shape[0]
        outs = []
        for i, (length, slot) in enumerate(zip(used, index, strict=True)):
            start = (slot * k.stride(0), slot * v.stride(0))
            strides = (k.stride(1), v.stride(1))
            outs.append(self.attend(q[i], k, v, start, strides, length, scale, causal))
        return torch.stack(outs)

    def fa3(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **a: Any) -> list[Any]:
        scale, causal, used = a["softmax_scale"], a["is_causal"], a["seqused_k"]
        if a["cu_seqlens_k"] is None:
            out = self.kvcache(q, k, v, used, a["kv_batch_idx"], scale, causal)
        else:
            assert a["kv_batch_idx"] is None
            offsets = (a["cu_seqlens_q"], a["cu_seqlens_k"])
            longest = (a["max_seqlen_q"], a["max_seqlen_k"])
            out = self.flat(q, k, v, *offsets, used, *longest, scale, causal)
        return [out, *(torch.empty(0) for _ in range(3))]


def by_name(schema: torch.FunctionSchema, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a dispatched call, defaults included."""
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return named | dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs


def register(library: Any, namespace: str, schema: str, function: Any) -> None:
    """Defines an operator whose implementation gets every argument by name."""
    name = schema.split("(")[0]
    library.define(schema)
    op = getattr(getattr(torch.ops, namespace), name).default

    def implementation(*args: Any, **kwargs: Any) -> Any:
        return function(**by_name(op._schema, *args, **kwargs))

    library.impl(name, implementation, "CPU")


def stand_in_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; two threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def last_argument() -> str:
    """Of vLLM's varlen_fwd: releases differ."""
    return "int num_splits"


@pytest.fixture
def stand_in(last_argument: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Every CUDA kernel on the CPU."""
    it = StandIn()

    def torch_flat(**a: Any) -> Any:
        out = it.flat(
            *(a[n] for n in ("query", "key", "value", "cum_seq_q", "cum_seq_k", "seqused_k")),
            *(a[n] for n in ("max_q", "max_k", "scale", "is_causal")),
        )
        return out, *(torch.empty(0) for _ in range(4))

    def varlen(**a: Any) -> list[torch.Tensor]:
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q")
        more = ("max_seqlen_k", "softmax_scale", "is_causal")
        return [it.flat(*(a[n] for n in (*names, *more))), torch.empty(0)]

    def kvcache(**a: Any) -> list[torch.Tensor]:
        names = ("q", "kcache", "vcache", "seqlens_k", "cache_batch_idx")
        return [it.kvcache(*(a[n] for n in (*names, "softmax_scale", "is_causal"))), torch.empty(0)]

    def fa2_kvcache(q: Any, k: Any, v: Any, **a: Any) -> torch.Tensor:
        names = ("cache_seqlens", "cache_batch_idx", "softmax_scale", "causal")
        return it.kvcache(q, k, v, *(a[n] for n in names))

    def fa2_varlen(**a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q")
        return it.flat(*(a[n] for n in (*names, "max_seqlen_k", "softmax_scale", "causal"))), a["q"]

    vllm, vllm3 = "_vllm_fa2_C", "_vllm_fa3_C"
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library(vllm, "DEF") as two,
        torch.library._scoped_library(vllm3, "DEF") as three,
        torch.library._scoped_library("flash_attn_3", "DEF") as flash,
    ):
        op = torch.ops.aten._flash_attention_forward.default
        aten.impl(
            "_flash_attention_forward",
            lambda *args, **kwargs: torch_flat(**by_name(op._schema, *args, **kwargs)),
            "CPU",
        )
        register(two, vllm, VARLEN.format(last=last_argument), varlen)
        register(two, vllm, KVCACHE, kvcache)
        register(three, vllm3, FA3_VLLM, it.fa3)
        register(flash, "flash_attn_3", FA3, it.fa3)
        stand_in_module(monkeypatch, "flash_attn", flash_attn_with_kvcache=fa2_kvcache)
        stand_in_module(
            monkeypatch,
            "flash_attn.flash_attn_interface",
            _flash_attn_varlen_forward=fa2_varlen,
        )
        stand_in_module(monkeypatch, "flash_attn_interface")
        stand_in_module(monkeypatch, "vllm")
        stand_in_module(monkeypatch, "vllm.vllm_flash_attn")
        yield it


def bench() -> Bench:
    return Bench("cpu", MODEL, TILES, pairs=1, max_bytes=1 << 28)


def cuda_kernels() -> dict[Kernel, Any]:
    found, missing = load_kernels("cuda", MODEL.dtype)
    assert missing == {}
    return found


def test_every_cuda_kernel_reads_the_slots_it_is_given(stand_in: StandIn) -> None:
    kernels = cuda_kernels()
    assert [kernel.label for kernel in kernels] == [k.label for k in KERNELS if k.device == "cuda"]
    where = bench()
    for kernel, prepare in kernels.items():
        stand_in.calls.clear()
        for per_region in (1, None):
            choice = LayoutChoice("token", per_region, PAGE)
            assert where.verify(choice, kernel, prepare) < 2e-2
        if kernel.form == "kvcache":
            assert where.verify(LayoutChoice("head", None, PAGE), kernel, prepare) < 2e-2
        assert set(stand_in.calls) == {kernel.form}
    where.close()


@pytest.mark.parametrize("last_argument", ["Generator? gen"])
def test_arguments_follow_the_schema(stand_in: StandIn) -> None:
    where = bench()
    for kernel, prepare in cuda_kernels().items():
        if kernel.label == "vllm-fa2/flat":
            assert where.verify(LayoutChoice("token", None, PAGE), kernel, prepare) < 2e-2
    assert stand_in.calls
    where.close()


def test_the_check_finds_a_kernel_that_misreads(stand_in: StandIn) -> None:
    stand_in.wrong_by = 1
    where = bench()
    for kernel, prepare in cuda_kernels().items():
        with pytest.raises(AssertionError, match="relative error"):
            where.verify(LayoutChoice("token", None, PAGE), kernel, prepare)
    where.close()


def test_the_check_finds_a_kernel_that_reads_past_the_cover(stand_in: StandIn) -> None:
    stand_in.tile = 512
    where = bench()
    kernel, prepare = next(iter(cuda_kernels().items()))
    with pytest.raises(AssertionError, match="nan"):
        where.verify(LayoutChoice("token", None, PAGE), kernel, prepare)
    where.close()


def test_missing_kernels_say_why() -> None:
    found, missing = load_kernels("cuda", torch.bfloat16)
    assert "torch/flat" in {kernel.label for kernel in found}
    for label, reason in missing.items():
        assert "Error" in reason or "does not exist" in reason, (label, reason)
    _, missing = load_kernels("cuda", torch.float32, ["torch"])
    assert missing == {"torch/flat": "not for torch.float32"}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ("call(Tensor q, int surprise) -> Tensor", "needs surprise"),
        ("call(Tensor k) -> Tensor", "has no argument q"),
    ],
)
def test_an_operator_that_changed_is_refused(schema: str, problem: str) -> None:
    with torch.library._scoped_library("vattn_bench_test", "DEF") as library:
        library.define(schema)
        op = torch.ops.vattn_bench_test.call.default
        with pytest.raises(Missing, match=problem):
            complete(op, {"q": torch.empty(0)})
