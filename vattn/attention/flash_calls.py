"""The kernel calls of a step: which sequences, and where their K and V are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vattn.attention.base import Int32, Step
from vattn.kv.layout import Layout


@dataclass(frozen=True)
class Call:
    """The sequences of one kernel call, as int32 tensors on the device.

    Args:
        rows: of the packed batch.
        decodes: one query each.
        slots: ``[n]``.
        kv_lens: ``[n]``, tokens in each slot, the new ones included.
        past_lens: ``[n]``, tokens in each slot before the new ones.
        query_starts: ``[n + 1]``, where each sequence's queries begin in ``rows``.
        kv_starts: per number of tokens in a slot, ``[n + 1]``: where each begins in the flat view.
            The last entry is where the last sequence ends.
        longest_query, longest_kv: of the sequences.
    """

    rows: slice
    decodes: bool
    slots: torch.Tensor
    kv_lens: torch.Tensor
    past_lens: torch.Tensor
    query_starts: torch.Tensor
    kv_starts: dict[int, torch.Tensor]
    longest_query: int
    longest_kv: int


def step_calls(step: Step) -> list[Call]:
    """The decodes and the chunks of a step."""
    sizes = slot_sizes(step.cache.layout)
    decodes, sequences = step.num_decodes, len(step.slots)
    parts = [(0, decodes, 0), (decodes, sequences, decodes)]
    arrays: list[Int32] = []
    for first, last, _ in parts:
        slots, kv_lens = step.slots[first:last], step.kv_lens[first:last]
        starts = np.concatenate([[0], np.cumsum(step.query_lens[first:last])])
        past_lens = kv_lens - step.query_lens[first:last]
        arrays += [slots, kv_lens, past_lens, starts.astype(np.int32)]
        arrays += [kv_starts(slots, kv_lens, size) for size in sizes]
    tensors = step.upload(*arrays)
    calls, each = [], 4 + len(sizes)
    for i, (first, last, row) in enumerate(parts):
        if first == last:
            continue
        slots_, kv_lens_, past_lens_, starts_, *begins = tensors[i * each : (i + 1) * each]
        lens = step.query_lens[first:last]
        calls.append(
            Call(
                rows=slice(row, row + int(lens.sum())),
                decodes=i == 0,
                slots=slots_,
                kv_lens=kv_lens_,
                past_lens=past_lens_,
                query_starts=starts_,
                kv_starts=dict(zip(sizes, begins, strict=True)),
                longest_query=int(lens.max()),
                longest_kv=int(step.kv_lens[first:last].max()),
            )
        )
    return calls


@dataclass(frozen=True)
class DecodeTensors:
    """What a step of ``n`` decodes needs, in memory on the device that stays where it is.

    Args:
        slots: int32 ``[n]``.
        kv_lens: int32 ``[n]``, tokens in each slot, the new one included.
        past_lens: int32 ``[n]``, tokens before the new one.
        kv_starts: per number of tokens in a slot, int32 ``[n + 1]``; see :class:`Call`.
        query_starts: int32 ``[n + 1]``, 0 to n.
        write_slots: int64 ``[n]``, the slots again.
        positions: int64 ``[n]``, of the new tokens.
        longest_kv: no ``kv_lens`` are above it, whatever is written there.
    """

    slots: torch.Tensor
    kv_lens: torch.Tensor
    past_lens: torch.Tensor
    kv_starts: dict[int, torch.Tensor]
    query_starts: torch.Tensor
    write_slots: torch.Tensor
    positions: torch.Tensor
    longest_kv: int


def prepare_decode(step: Step, tensors: DecodeTensors) -> None:
    """Does for a step of decodes what ``prepare`` does, without a transfer.

    The calls read the tensors when they run, so a recorded step can be run again over new contents.
    """
    step.write_slots, step.write_positions = tensors.write_slots, tensors.positions
    step.plan["calls"] = [
        Call(
            rows=slice(0, len(tensors.slots)),
            decodes=True,
            slots=tensors.slots,
            kv_lens=tensors.kv_lens,
            past_lens=tensors.past_lens,
            query_starts=tensors.query_starts,
            kv_starts=tensors.kv_starts,
            longest_query=1,
            longest_kv=tensors.longest_kv,
        )
    ]


def slot_sizes(layout: Layout) -> list[int]:
    """Numbers of tokens in a slot that occur; layers that differ are in different regions."""
    return sorted({region.slot_tokens for region in layout.regions})


def kv_starts(slots: Int32, kv_lens: Int32, slot_tokens: int) -> Int32:
    """Where slots begin in the flat view. With lengths given, kernels take any order of these."""
    starts = np.zeros(len(slots) + 1, np.int32)
    starts[:-1] = slots * np.int32(slot_tokens)
    if len(slots):
        starts[-1] = starts[-2] + kv_lens[-1]
    return starts
