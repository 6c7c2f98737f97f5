"""The kernel calls of a step: which sequences, and where their K and V are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vattn.attention.base import Int32, Step


@dataclass(frozen=True)
class Call:
    """The sequences of one kernel call, as int32 tensors on the device.

    Args:
        rows: of the packed batch.
        decodes: one query each.
        slots: ``[n]``.
        kv_lens: ``[n]``, tokens in each slot.
        query_starts: ``[n + 1]``, where each sequence's queries begin in ``rows``.
        kv_starts: per number of tokens in a slot, ``[n + 1]``: where each begins in the flat view.
            The last entry is where the last sequence ends.
        longest_query, longest_kv: of the sequences.
    """

    rows: slice
    decodes: bool
    slots: torch.Tensor
    kv_lens: torch.Tensor
    query_starts: torch.Tensor
    kv_starts: dict[int, torch.Tensor]
    longest_query: int
    longest_kv: int


def step_calls(step: Step) -> list[Call]:
    """The decodes and the chunks of a step."""
    sizes = sorted({region.slot_tokens for region in step.cache.layout.regions})
    decodes, sequences = step.num_decodes, len(step.slots)
    parts = [(0, decodes, 0), (decodes, sequences, decodes)]
    arrays: list[Int32] = []
    for first, last, _ in parts:
        slots, kv_lens = step.slots[first:last], step.kv_lens[first:last]
        starts = np.concatenate([[0], np.cumsum(step.query_lens[first:last])])
        arrays += [slots, kv_lens, starts.astype(np.int32)]
        arrays += [_kv_starts(slots, kv_lens, size) for size in sizes]
    tensors = step.upload(*arrays)
    calls, each = [], 3 + len(sizes)
    for i, (first, last, row) in enumerate(parts):
        if first == last:
            continue
        slots_, kv_lens_, starts_, *kv_starts = tensors[i * each : (i + 1) * each]
        lens = step.query_lens[first:last]
        calls.append(
            Call(
                rows=slice(row, row + int(lens.sum())),
                decodes=i == 0,
                slots=slots_,
                kv_lens=kv_lens_,
                query_starts=starts_,
                kv_starts=dict(zip(sizes, kv_starts, strict=True)),
                longest_query=int(lens.max()),
                longest_kv=int(step.kv_lens[first:last].max()),
            )
        )
    return calls


def _kv_starts(slots: Int32, kv_lens: Int32, slot_tokens: int) -> Int32:
    """Where slots begin in the flat view. With lengths given, kernels take any order of these."""
    starts = np.zeros(len(slots) + 1, np.int32)
    starts[:-1] = slots * np.int32(slot_tokens)
    if len(slots):
        starts[-1] = starts[-2] + kv_lens[-1]
    return starts
