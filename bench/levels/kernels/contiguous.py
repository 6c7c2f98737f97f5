"""Attention over contiguous K and V by the libraries that also read blocks.

FlashAttention is called by the engine's own backends. SDPA is called as the engine's backend of a
CPU calls it. FlashInfer has no kernel for a batch of decodes over contiguous memory: it reads slots
as pages that follow each other; a prompt goes to its ragged kernel, which knows no pages.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.levels.kernels.blocks import KV, PrepareLayers, on_blocks
from bench.paged.flash_kernels import FlashKernel
from bench.paged.kernels import PagedKernel
from bench.problem import Attend, Problem
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend
from vattn.attention.flash_calls import Call, kv_starts
from vattn.attention.operators import Unavailable, bind
from vattn.attention.sdpa import SdpaBackend, attend_decodes
from vattn.attention.sdpa_plan import ChunkCall, Plan

_WORKSPACE_BYTES = 128 << 20
# Pages of FlashInfer within a slot, the largest that divides it: it splits work between pages.
_PAGES_IN_SLOT = (128, 64, 32, 16, 8, 4, 2, 1)
_RAGGED_PLAN = (
    "self qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk causal sm_scale q_data_type "
    "kv_data_type"
)


def of_flash(kernel: FlashKernel, spec: AttentionSpec, device: torch.device) -> PrepareLayers:
    """The backend of the engine that calls the same library."""
    backend = type(kernel).contiguous.create([spec], device, append_in_kernel=False)
    return over_slots(backend, spec)


def over_slots(backend: FlashBackend, spec: AttentionSpec) -> PrepareLayers:
    """A backend of the engine on layers of slots."""

    def of_layers(problem: Problem, layers: Sequence[KV]) -> list[Attend]:
        call = slots_call(problem, layers[0][0].shape[1])
        packed = problem.q.flatten(0, 1)

        def attend(k: torch.Tensor, v: torch.Tensor) -> Attend:
            return lambda: backend.attend(call, spec, packed, k, v, None).view(problem.q.shape)

        return [attend(k, v) for k, v in layers]

    return of_layers


def slots_call(problem: Problem, slot_tokens: int) -> Call:
    """The problem as a step of the engine has it."""
    slots = np.array(problem.slots, np.int32)
    lengths = np.array(problem.lengths, np.int32)
    starts = kv_starts(slots, lengths, slot_tokens)
    return Call(
        rows=slice(0, problem.batch * problem.queries),
        decodes=problem.queries == 1,
        slots=problem.int32(problem.slots),
        kv_lens=problem.int32(problem.lengths),
        past_lens=problem.int32([length - problem.queries for length in problem.lengths]),
        query_starts=problem.offsets_q(),
        kv_starts={slot_tokens: problem.int32(starts.tolist())},
        longest_query=problem.queries,
        longest_kv=problem.longest,
    )


# SDPA ---------------------------------------------------------------------------------------------


def of_sdpa(spec: AttentionSpec) -> PrepareLayers:
    """Neighbouring slots of one length are one call, so nothing between them is read."""

    def of_layers(problem: Problem, layers: Sequence[KV]) -> list[Attend]:
        return [_dense(problem, spec, k, v) for k, v in layers]

    return of_layers


def _dense(problem: Problem, spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor) -> Attend:
    groups = itertools.groupby(
        range(problem.batch), lambda i: (problem.slots[i] - i, problem.lengths[i])
    )
    calls = [_neighbours(problem, spec, list(group), k, v) for _, group in groups]

    def attend() -> torch.Tensor:
        outs = [call() for call in calls]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return attend


def _neighbours(
    problem: Problem, spec: AttentionSpec, group: Sequence[int], k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor]:
    slot, length, n = problem.slots[group[0]], problem.lengths[group[0]], len(group)
    keys, values = (x[slot : slot + n, :length].transpose(1, 2) for x in (k, v))
    q = problem.q[group[0] : group[0] + n]
    if problem.queries == 1:
        own = q.flatten(0, 1)
        return lambda: attend_decodes(spec, own, keys, values, None, None).view(q.shape)
    backend = SdpaBackend(device=q.device)
    past = length - problem.queries
    chunk = ChunkCall(0, n, problem.queries, past, slot, neighbours=True)
    plan = Plan([], [chunk])  # keeps the mask
    rows = q.transpose(1, 2)
    return lambda: backend.attend_chunk(chunk, spec, rows, keys, values, plan, None).transpose(1, 2)


# FlashInfer ---------------------------------------------------------------------------------------


def pages_of_slots(fresh: Callable[[], PagedKernel]) -> PrepareLayers:
    """A paged kernel over contiguous slots, each of them pages that follow each other.

    Args:
        fresh: a kernel whose plan nobody else overwrites.
    """

    def of_layers(problem: Problem, layers: Sequence[KV]) -> list[Attend]:
        slots, slot_tokens, heads, dim = layers[0][0].shape
        page = next(size for size in _PAGES_IN_SLOT if slot_tokens % size == 0)
        per_slot = slot_tokens // page
        first = np.array(problem.slots, np.int32)[:, None] * per_slot
        table = (first + np.arange(per_slot)).astype(np.int32)
        shape = (slots * per_slot, page, heads, dim)
        paged = [(k.view(shape), v.view(shape)) for k, v in layers]
        return on_blocks(fresh(), table, page)(problem, paged)

    return of_layers


def ragged_prompt(spec: AttentionSpec) -> PrepareLayers:
    """FlashInfer's ragged prefill, a call for each request: a batch would have to be packed.

    Raises:
        Unavailable: there is none, or it takes other arguments than we know.
    """
    name = "BatchPrefillWithRaggedKVCacheWrapper"
    kind: Any = getattr(importlib.import_module("flashinfer"), name, None)
    if kind is None:
        raise Unavailable(f"flashinfer has no {name}")
    bind(f"{name}.plan", kind.plan, _RAGGED_PLAN)

    def planned(queries: int, length: int, device: torch.device) -> Any:
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = kind(workspace, "NHD")
        wrapper.plan(
            qo_indptr=torch.tensor([0, queries], dtype=torch.int32),
            kv_indptr=torch.tensor([0, length], dtype=torch.int32),
            num_qo_heads=spec.heads,
            num_kv_heads=spec.kv_heads,
            head_dim_qk=spec.head_dim,
            causal=True,
            sm_scale=spec.scale,
            q_data_type=spec.dtype,
            kv_data_type=spec.dtype,
        )
        return wrapper

    def of_layers(problem: Problem, layers: Sequence[KV]) -> list[Attend]:
        device = problem.q.device
        wrappers = [planned(problem.queries, length, device) for length in problem.lengths]

        def attend(k: torch.Tensor, v: torch.Tensor) -> Attend:
            return lambda: _stacked(
                [
                    wrapper.run(q, k[slot, :length], v[slot, :length])
                    for wrapper, q, slot, length in zip(
                        wrappers, problem.q, problem.slots, problem.lengths, strict=True
                    )
                ]
            )

        return [attend(k, v) for k, v in layers]

    return of_layers


def _stacked(outs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outs[0].unsqueeze(0) if len(outs) == 1 else torch.stack(list(outs))
