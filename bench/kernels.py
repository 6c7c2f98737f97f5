"""Attention kernels as small adapters over slots, in the two call forms that reach them uncopied.

*kvcache*: ``[slots, longest, kv_heads, head_dim]`` with the slot of each sequence in
``cache_batch_idx`` and its length in ``cache_seqlens``. *flat*: ``[slots * slot_tokens, kv_heads,
head_dim]`` with ``cu_seqlens_k[i] = slot_i * slot_tokens``, in any order, and ``seqused_k``. SDPA
on a CPU reads neighbouring slots of one length in one call.

An adapter checks at load what it needs (package, operator, argument names) and raises
:class:`Missing` with the reason. It prepares a call once; what is timed is the call alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.problem import Attend, Problem, flat, prepare_sdpa


class Missing(Exception):
    """A kernel that cannot be used here, and why."""


Prepare = Callable[[Problem, torch.Tensor, torch.Tensor], Attend]


@dataclass(frozen=True)
class Kernel:
    """A kernel in one call form. ``load`` gives the function that prepares its calls."""

    name: str
    form: str  # "kvcache", "flat" or "dense"
    device: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Prepare]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.form}"


# Operators of torch -------------------------------------------------------------------------------

# What each argument that we do not use has to be where an operator gives it no default.
_NEUTRAL: dict[str, object] = {
    "attention_chunk": 0,
    "cp_rank": 0,
    "cp_world_size": 1,
    "is_rotary_interleaved": False,
    "num_splits": 0,  # the kernel chooses
    "p_dropout": 0.0,
    "return_softmax": False,
    "sm_margin": 0,
    "softcap": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "zero_tensors": False,
}


def complete(op: Any, values: dict[str, object]) -> dict[str, object]:
    """All arguments of an operator by name: ours, and what leaves the rest unused.

    The argument lists differ between releases, so they are read from the schema, not assumed.

    Raises:
        Missing: it lacks an argument of ours, or needs one that we know nothing of.
    """
    schema = op._schema
    known = {argument.name for argument in schema.arguments}
    unknown = sorted(set(values) - known)
    if unknown:
        raise Missing(f"{schema.name} has no argument {', '.join(unknown)}")
    out = dict(values)
    for argument in schema.arguments:
        if argument.name in out or argument.has_default_value():
            continue
        if argument.type.kind() == "OptionalType":
            out[argument.name] = None
        elif argument.name in _NEUTRAL:
            out[argument.name] = _NEUTRAL[argument.name]
        else:
            raise Missing(f"{schema.name} needs {argument.name}, which is not known here")
    return out


def operator(namespace: str, name: str, module: str | None) -> Any:
    """``torch.ops.namespace.name.default``, after importing the module that registers it."""
    if module is not None:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken build of an extension may raise anything
            raise Missing(f"{module}: {type(error).__name__}: {error}") from None
    try:
        return getattr(getattr(torch.ops, namespace), name).default
    except (AttributeError, RuntimeError):
        raise Missing(f"torch.ops.{namespace}.{name} does not exist") from None


def _first(out: Any) -> torch.Tensor:
    first: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return first


def _bind(op: Any, shape: Sequence[int], values: dict[str, object]) -> Attend:
    arguments = complete(op, values)
    return lambda: _first(op(**arguments)).reshape(*shape)


def _torch_flat() -> Prepare:
    op = operator("aten", "_flash_attention_forward", None)
    if all(argument.name != "seqused_k" for argument in op._schema.arguments):
        raise Missing("aten::_flash_attention_forward of this torch has no seqused_k")

    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        return _bind(
            op,
            problem.q.shape,
            {
                "query": problem.q.flatten(0, 1),
                "key": flat(k),
                "value": flat(v),
                "cum_seq_q": problem.offsets_q(),
                "cum_seq_k": problem.offsets_k(k.shape[1], k.shape[0]),
                "max_q": problem.queries,
                "max_k": problem.longest,
                "dropout_p": 0.0,
                "is_causal": problem.causal,
                "return_debug_mask": False,
                "scale": problem.scale,
                "seqused_k": problem.int32(problem.lengths),
            },
        )

    return prepare


def _varlen_operator(namespace: str, name: str, module: str) -> Prepare:
    """The flat form of FlashAttention's operators: ``varlen_fwd`` of 2, ``fwd`` of 3."""
    op = operator(namespace, name, module)

    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        return _bind(
            op,
            problem.q.shape,
            {
                "q": problem.q.flatten(0, 1),
                "k": flat(k),
                "v": flat(v),
                "cu_seqlens_q": problem.offsets_q(),
                "cu_seqlens_k": problem.offsets_k(k.shape[1], k.shape[0]),
                "seqused_k": problem.int32(problem.lengths),
                "max_seqlen_q": problem.queries,
                "max_seqlen_k": problem.longest,
                "softmax_scale": problem.scale,
                "is_causal": problem.causal,
            },
        )

    return prepare


def _kvcache_operator(namespace: str, name: str, module: str) -> Prepare:
    """The kvcache form of the operators; FlashAttention-3 names two arguments differently."""
    op = operator(namespace, name, module)
    names = {argument.name for argument in op._schema.arguments}
    old = "kcache" in names

    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        return _bind(
            op,
            problem.q.shape,
            {
                "q": problem.q,
                "kcache" if old else "k": k[:, : problem.longest],
                "vcache" if old else "v": v[:, : problem.longest],
                "seqlens_k" if old else "seqused_k": problem.int32(problem.lengths),
                "cache_batch_idx" if old else "kv_batch_idx": problem.int32(problem.slots),
                "softmax_scale": problem.scale,
                "is_causal": problem.causal,
            },
        )

    return prepare


# The flash_attn package ---------------------------------------------------------------------------


def _package(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # see operator()
        raise Missing(f"{module}.{name}: {type(error).__name__}: {error}") from None


def _fa2_kvcache() -> Prepare:
    function = _package("flash_attn", "flash_attn_with_kvcache")

    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        return partial(
            function,
            problem.q,
            k[:, : problem.longest],
            v[:, : problem.longest],
            cache_seqlens=problem.int32(problem.lengths),
            cache_batch_idx=problem.int32(problem.slots),
            softmax_scale=problem.scale,
            causal=problem.causal,
        )

    return prepare


def _fa2_flat() -> Prepare:
    # The public flash_attn_varlen_func has no seqused_k; what it calls has.
    function = _package("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward")

    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        call = partial(
            function,
            q=problem.q.flatten(0, 1),
            k=flat(k),
            v=flat(v),
            cu_seqlens_q=problem.offsets_q(),
            cu_seqlens_k=problem.offsets_k(k.shape[1], k.shape[0]),
            max_seqlen_q=problem.queries,
            max_seqlen_k=problem.longest,
            dropout_p=0.0,
            softmax_scale=problem.scale,
            causal=problem.causal,
            seqused_k=problem.int32(problem.lengths),
        )
        return lambda: _first(call()).reshape(problem.q.shape)

    return prepare


# All of them --------------------------------------------------------------------------------------

_HALF = (torch.bfloat16, torch.float16)
_VLLM = "vllm.vllm_flash_attn"

KERNELS: tuple[Kernel, ...] = (
    Kernel("torch", "flat", "cuda", _HALF, _torch_flat),
    Kernel("fa2", "kvcache", "cuda", _HALF, _fa2_kvcache),
    Kernel("fa2", "flat", "cuda", _HALF, _fa2_flat),
    Kernel(
        "fa3",
        "kvcache",
        "cuda",
        _HALF,
        partial(_kvcache_operator, "flash_attn_3", "fwd", "flash_attn_interface"),
    ),
    Kernel(
        "fa3",
        "flat",
        "cuda",
        _HALF,
        partial(_varlen_operator, "flash_attn_3", "fwd", "flash_attn_interface"),
    ),
    Kernel(
        "vllm-fa2",
        "kvcache",
        "cuda",
        _HALF,
        partial(_kvcache_operator, "_vllm_fa2_C", "fwd_kvcache", _VLLM),
    ),
    Kernel(
        "vllm-fa2",
        "flat",
        "cuda",
        _HALF,
        partial(_varlen_operator, "_vllm_fa2_C", "varlen_fwd", _VLLM),
    ),
    Kernel(
        "vllm-fa3",
        "kvcache",
        "cuda",
        _HALF,
        partial(_kvcache_operator, "_vllm_fa3_C", "fwd", _VLLM),
    ),
    Kernel(
        "vllm-fa3",
        "flat",
        "cuda",
        _HALF,
        partial(_varlen_operator, "_vllm_fa3_C", "fwd", _VLLM),
    ),
    Kernel("sdpa", "dense", "cpu", (torch.float32, torch.bfloat16), lambda: prepare_sdpa),
)


def load_kernels(
    device: str, dtype: torch.dtype, names: Sequence[str] | None = None
) -> tuple[dict[Kernel, Prepare], dict[str, str]]:
    """The kernels for a device and dtype that work here, and why others do not."""
    found: dict[Kernel, Prepare] = {}
    missing: dict[str, str] = {}
    for kernel in KERNELS:
        if kernel.device != device or (names and kernel.name not in names):
            continue
        if dtype not in kernel.dtypes:
            missing[kernel.label] = f"not for {dtype}"
            continue
        try:
            found[kernel] = kernel.load()
        except Missing as reason:
            missing[kernel.label] = str(reason)
    return found, missing
