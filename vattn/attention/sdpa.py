"""Scaled dot product attention of PyTorch on slots: the backend of CPUs, and of everything else.

Decodes of neighbouring slots share one call over a view ``[slots, kv_heads, tokens, head_dim]`` of
the cache, with the query heads of a KV head as the rows of one matrix and a length mask. Prefill
chunks of equal shape share one as well. K and V are read where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch

from vattn.attention import dense
from vattn.attention.append import append, append_mode
from vattn.attention.base import AppendMode, AttentionSpec, Step, prepare_append
from vattn.attention.sdpa_plan import ChunkCall, DecodeCall, DecodeCuts, Plan, chunk_calls
from vattn.kv.layout import Order

# What a call costs beside its tokens, in elements of K: 15 us for the views, the call and the
# result, against 0.2 ns per element with its V (measured on two AVX-512 cores, float32).
CALL_ELEMENTS = 75_000
# Queries of one call over a sliding window: small, so that little outside the window is computed.
_WINDOW_ROWS = 128
# A chunk and its past are one call with a mask up to so many scores, and two without one beyond:
# 24 us against 59 us for 16 tokens after 64, 23.3 ms against 22.0 ms for 512 after 4096.
_MOST_MASK = 1 << 17
# Cover of each sequence where unmapped memory faults, against calls of one sequence each.
_TILE_ELSEWHERE = 64

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SdpaBackend:
    """PyTorch's fused attention on a CPU, and what torch has elsewhere.

    A call over several slots reads past the end of the shorter sequences. Where memory that is not
    mapped faults, a call stays within the tiles of all its sequences, which the cache keeps mapped.

    Args:
        tile_tokens: sequences whose lengths differ by less may then share a call. On a CPU what is
            not mapped reads as zeros, and 1 costs no memory.
        device: where it will run.
    """

    name = "sdpa"
    order: Order | None = None
    graphs = False  # which slots share a call is decided step by step

    def __init__(self, tile_tokens: int = 1, device: torch.device | str = "cpu") -> None:
        self.kv_tile_tokens: tuple[int, ...] = (tile_tokens,)
        self._device = torch.device(device)
        self._cuts = DecodeCuts()
        self._bands: dict[int, torch.Tensor] = {}

    @classmethod
    def create(cls, specs: Sequence[AttentionSpec], device: torch.device) -> Self:
        """For a model's layers on a device."""
        del specs
        return cls(1 if device.type == "cpu" else _TILE_ELSEWHERE, device)

    @classmethod
    def refusal(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve a layer on a device; None if it can."""
        del device
        if spec.dtype not in _DTYPES:
            return f"{spec.dtype} is not one of {', '.join(map(str, _DTYPES))}"
        if spec.heads % spec.kv_heads:
            return f"{spec.heads} heads do not divide among {spec.kv_heads} KV heads"
        return None

    @property
    def append_mode(self) -> AppendMode:
        """How decodes' K and V get into their slots."""
        return append_mode(self._device)

    def prepare(self, step: Step, specs: Sequence[AttentionSpec]) -> None:
        """Cuts the step into calls, once per window that its layers have."""
        prepare_append(step)
        chunks = chunk_calls(step)
        for spec in specs:
            if spec.window not in step.plan:
                call_tokens = CALL_ELEMENTS / (spec.kv_heads * spec.head_dim)
                decodes = self._cuts.calls(step, spec.window, call_tokens)
                step.plan[spec.window] = Plan(decodes, chunks)

    def forward(
        self,
        layer: int,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends K and V, then attends; see :meth:`vattn.attention.base.Backend.forward`."""
        plan: Plan = step.plan[spec.window]
        _append(layer, key, value, step, plan.chunks)
        k, v = step.cache.layer(layer)
        parts = [
            _decode(call, spec, query[call.first : call.last], k, v, sinks) for call in plan.decodes
        ]
        for chunk in plan.chunks:
            if chunk.start == 0:
                # What was just computed is at hand, and for any number of slots.
                seen = [by_sequence(x, chunk) for x in (key, value)]
            else:
                slots = slice(chunk.slot, chunk.slot + chunk.sequences)
                seen = [x[slots, : chunk.start + chunk.n] for x in (k, v)]
            own = by_sequence(query, chunk).transpose(1, 2)
            out = self.attend_chunk(
                chunk, spec, own, seen[0].transpose(1, 2), seen[1].transpose(1, 2), plan, sinks
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_chunk(
        self,
        chunk: ChunkCall,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``query [B, heads, n, d]`` at the end of ``key, value [B, kv_heads, start + n, d]``.

        Below a window K and V are not read.
        """
        n, start, tokens = chunk.n, chunk.start, chunk.start + chunk.n
        window = spec.window if spec.window is not None and spec.window < tokens else None
        mergeable = dense.tells_lse(query.device)
        if needs_matmul(spec, query) or window is not None or (start > 0 and not mergeable):
            return self._chunk_by_rows(chunk, spec, query, key, value, sinks)
        if start == 0:
            out, lse = dense.attend(query, key, value, scale=spec.scale, causal=True)
        elif n * tokens <= _MOST_MASK:
            if (n, start) not in plan.masks:
                plan.masks[n, start] = _causal_mask(n, start, query.device)
            mask = plan.masks[n, start]
            out, lse = dense.attend(query, key, value, scale=spec.scale, mask=mask)
        else:
            past = dense.attend(query, key[:, :, :start], value[:, :, :start], scale=spec.scale)
            own = dense.attend(
                query, key[:, :, start:], value[:, :, start:], scale=spec.scale, causal=True
            )
            out, lse = dense.merge(past, own)
        if sinks is not None:
            assert lse is not None
            out = dense.add_sinks(out, lse, sinks.view(1, -1, 1))
        return out

    def _chunk_by_rows(
        self,
        chunk: ChunkCall,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """A few queries at a time with a mask, over no more keys than they see."""
        out = torch.empty_like(query)
        for rows, keys, mask in self._masked_rows(chunk, spec, query.device):
            out[:, :, rows] = _masked(
                spec, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, sinks
            )
        return out

    def _masked_rows(
        self, chunk: ChunkCall, spec: AttentionSpec, device: torch.device
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Stretches of a chunk's queries: (queries, the keys they see, mask)."""
        start, window = chunk.start, spec.window
        tokens = start + chunk.n
        seen = tokens if window is None else min(tokens, window + _WINDOW_ROWS)
        together = (
            spec.heads
            if chunk.sequences < spec.kv_heads
            else (chunk.sequences * spec.heads // spec.kv_heads)
        )
        most = dense.rows_that_fit(together, seen)
        if window is not None:
            most = min(most, _WINDOW_ROWS)
        for first in range(0, chunk.n, most):
            last = min(first + most, chunk.n)
            end = start + last
            begin = 0 if window is None else max(0, start + first - window + 1)
            past = start + first - begin
            if window is None:
                mask = _causal_mask(last - first, past, device)
            else:
                band = self._band(window, device)
                mask = band[: last - first, window - 1 - past : window - 1 + last - first]
            yield slice(first, last), slice(begin, end), mask

    def _band(self, window: int, device: torch.device) -> torch.Tensor:
        """The mask of queries over a sliding window, keys counted from the first query's window."""
        if window not in self._bands:
            ones = torch.ones(_WINDOW_ROWS, window - 1 + _WINDOW_ROWS, dtype=torch.bool)
            outside = ones.triu(window) | ones.tril(-1)
            self._bands[window] = torch.zeros(ones.shape).masked_fill_(outside, -torch.inf)
        if self._bands[window].device != device:
            self._bands[window] = self._bands[window].to(device)
        return self._bands[window]


def needs_matmul(spec: AttentionSpec, query: torch.Tensor) -> bool:
    """Whether torch has no fused kernel for it, or none that tells the log-sum-exp for sinks."""
    return spec.softcap is not None or (spec.sinks and not dense.tells_lse(query.device))


def _causal_mask(n: int, past: int, device: torch.device) -> torch.Tensor:
    """Of ``n`` queries over ``past`` keys before them and their own: float32 ``[n, past + n]``."""
    return torch.full((n, past + n), -torch.inf, device=device).triu_(past + 1)


def _masked(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if needs_matmul(spec, query):
        return dense.attend_by_matmul(
            query,
            key,
            value,
            scale=spec.scale,
            mask=mask,
            softcap=spec.softcap,
            sinks=sinks,
        )
    out, lse = dense.attend(query, key, value, scale=spec.scale, mask=mask)
    if sinks is not None:
        assert lse is not None
        out = dense.add_sinks(out, lse, sinks.view(1, -1, 1))
    return out


def _decode(
    call: DecodeCall,
    spec: AttentionSpec,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``query [n, heads, head_dim]`` of a call's decodes."""
    slots = slice(call.slot, call.slot + call.slots)
    key = k[slots, call.begin : call.end].transpose(1, 2)
    value = v[slots, call.begin : call.end].transpose(1, 2)
    if call.rows is not None:
        query = query[call.rows]
    out = attend_decodes(spec, query, key, value, call.mask, sinks)
    return out if call.keep is None else out[call.keep]


def attend_decodes(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query each, ``[n, heads, head_dim]``, over ``key, value [n, kv_heads, L, head_dim]``.

    The query heads of a KV head are the rows of one matrix. ``mask``: float32 ``[n, 1, 1, L]``.
    """
    if needs_matmul(spec, query):
        out = _masked(spec, query.unsqueeze(2), key, value, mask, sinks)
        return out.reshape(query.shape)
    grouped = query.reshape(len(query), spec.kv_heads, -1, spec.head_dim)
    out, lse = dense.attend(grouped, key, value, scale=spec.scale, mask=mask)
    if sinks is not None:
        assert lse is not None
        out = dense.add_sinks(out, lse, sinks.view(1, spec.kv_heads, -1))
    return out.reshape(query.shape)


def _append(
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    chunks: Sequence[ChunkCall],
) -> None:
    """Writes new K and V: by index, and as one copy where the destination is one rectangle."""
    if step.num_decodes:
        append(layer, key, value, step, slice(0, step.num_decodes))
    targets = step.cache.layer(layer)
    for chunk in chunks:
        if not chunk.neighbours:
            append(layer, key, value, step, chunk.rows)
            continue
        slots = slice(chunk.slot, chunk.slot + chunk.sequences)
        tokens = slice(chunk.start, chunk.start + chunk.n)
        for target, new in zip(targets, (key, value), strict=True):
            target[slots, tokens] = by_sequence(new, chunk)


def by_sequence(packed: torch.Tensor, chunk: ChunkCall) -> torch.Tensor:
    """The chunk's part of a packed ``[T, heads, d]`` as ``[sequences, n, heads, d]``."""
    return packed[chunk.rows].view(chunk.sequences, chunk.n, *packed.shape[1:])
