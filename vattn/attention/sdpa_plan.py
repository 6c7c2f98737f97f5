"""How a step is cut into calls of dense attention; computed once per step and window."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.base import Step
from vattn.attention.batching import Int64, Reads, split

# The cut into calls is kept while the same sequences grow in step, for so many steps.
_CUT_STEPS = 16


@dataclass(frozen=True)
class DecodeCall:
    """Decodes ``[first, last)`` of the step over tokens ``[begin, end)`` of neighbouring slots.

    The slots are ``[slot, slot + slots)``. ``mask``, float32 ``[slots, 1, 1, end - begin]``, is
    None if every decode attends to all of these tokens. Where slots between are holes, ``rows``
    says whose query each slot takes (a hole takes any) and ``keep`` which slots are decodes.
    """

    first: int
    last: int
    slot: int
    slots: int
    begin: int
    end: int
    mask: torch.Tensor | None
    rows: torch.Tensor | None = None
    keep: torch.Tensor | None = None


@dataclass(frozen=True)
class ChunkCall:
    """``sequences`` chunks of ``n`` tokens each, from ``row`` of the packed batch on.

    All begin at position ``start``, in slots ``slot`` and the following ones if ``neighbours``
    (always so unless ``start`` is 0: then nothing but the chunk itself is read).
    """

    row: int
    sequences: int
    n: int
    start: int
    slot: int
    neighbours: bool

    @property
    def rows(self) -> slice:
        """Its part of the packed batch."""
        return slice(self.row, self.row + self.sequences * self.n)


@dataclass
class Plan:
    """The calls of one step for the layers of one window."""

    decodes: list[DecodeCall]
    chunks: list[ChunkCall]
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass
class DecodeCuts:
    """Cuts decodes into calls, remembering the last cut per window: most steps change nothing."""

    _last: dict[int | None, tuple[bytes, npt.NDArray[np.int32], list[tuple[int, int]]]] = field(
        default_factory=dict
    )

    def calls(self, step: Step, window: int | None, call_tokens: float) -> list[DecodeCall]:
        """The calls for the step's decodes in layers of one window.

        Args:
            step: not yet run.
            window: of the layers.
            call_tokens: what a call costs beside its tokens, in tokens.
        """
        if step.num_decodes == 0:
            return []
        reads = _reads(step, window)
        slots, kv_lens = reads.slots.tobytes(), step.kv_lens[: step.num_decodes]
        last = self._last.get(window)
        if last is not None and last[0] == slots and reads.lowest is None:
            grown = kv_lens - last[1]
            if 0 <= grown[0] < _CUT_STEPS and (grown == grown[0]).all():
                return [_decode_call(reads, *rows, step.cache.device) for rows in last[2]]
        cut = split(reads, call_tokens)
        self._last[window] = (slots, kv_lens.copy(), cut)
        return [_decode_call(reads, *rows, step.cache.device) for rows in cut]


def holes_readable(step: Step) -> bool:
    """Whether all of every slot may be read: what is not mapped there reads as zeros."""
    return step.cache.holes_readable


def _reads(step: Step, window: int | None) -> Reads:
    n = step.num_decodes
    slots, end = step.slots[:n].astype(np.int64), step.kv_lens[:n].astype(np.int64)
    begin = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    if holes_readable(step):
        return Reads(slots, begin, end)
    # The cache keeps whole tiles mapped: from the one in which the window of the query begins to
    # the one with the last token.
    tiles = step.cache.layout.tiles
    highest = np.max([-(-end // tile) * tile for tile in tiles], axis=0)
    lowest = begin
    if window is not None:
        since = np.maximum(end - 1 - window, 0)
        lowest = np.min([since // tile * tile for tile in tiles], axis=0)
    return Reads(slots, begin, end, lowest, highest)


def _decode_call(reads: Reads, first: int, last: int, device: torch.device) -> DecodeCall:
    slots = reads.slots[first:last]
    begins, ends = reads.begin[first:last], reads.end[first:last]
    slot, begin, end = int(slots[0]), int(begins.min()), int(ends.max())
    span = int(slots[-1]) - slot + 1
    rows = keep = None
    if span > last - first:
        at = slots - slot
        of = np.zeros(span, np.int64)
        of[at] = np.arange(last - first)
        rows, keep = torch.from_numpy(of).to(device), torch.from_numpy(at).to(device)
        begins, ends = begins[of], ends[of]
    mask = None
    if begins.max() > begin or ends.min() < end:
        mask = length_mask(begins - begin, ends - begin, end - begin).to(device)
    return DecodeCall(first, last, slot, span, begin, end, mask, rows, keep)


def length_mask(begins: Int64, ends: Int64, tokens: int) -> torch.Tensor:
    """0 where a row attends, tokens ``[begins, ends)``, and minus infinity elsewhere."""
    at = np.arange(tokens)
    outside = at >= ends[:, None]
    if begins.any():
        outside |= at < begins[:, None]
    mask = np.zeros(outside.shape, np.float32)
    mask[outside] = -np.inf
    return torch.from_numpy(mask)[:, None, None]


def chunk_calls(step: Step) -> list[ChunkCall]:
    """Joins chunks of equal shape that follow each other."""
    calls: list[ChunkCall] = []
    row = step.num_decodes
    for i in range(step.num_decodes, len(step.slots)):
        slot, n = int(step.slots[i]), int(step.query_lens[i])
        start = int(step.kv_lens[i]) - n
        last = calls[-1] if calls else None
        if last is not None and (last.n, last.start) == (n, start):
            follows = last.neighbours and slot == last.slot + last.sequences
            if follows or start == 0:
                calls[-1] = ChunkCall(
                    last.row, last.sequences + 1, n, start, last.slot, neighbours=follows
                )
                row += n
                continue
        calls.append(ChunkCall(row, 1, n, start, slot, neighbours=True))
        row += n
    return calls
