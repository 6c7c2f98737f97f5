"""What attention backends are tested with: a plain reference, and sequences in a real cache.

The reference loops over sequences in float64 and knows nothing of caches. The sequences of a
:class:`World` remember every K and V ever written to them, so what a backend reads from the cache
is compared with what it ought to have read. Around each sequence the memory is made as bad as it
may be: finite garbage behind the last token up to the end of the tile, NaN in what is mapped
beyond, NaN below a window, and pages that are not mapped at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import vattn
from vattn.attention.base import AttentionSpec, Backend, Step
from vattn.kv.layout import Order, round_up

GARBAGE = 3.0e4  # finite in every dtype, and ruinous if a mask lets it through
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence's last ``n`` positions, in float64.

    ``query [n, heads, d]``, ``key, value [L, kv_heads, d]``; the result is like ``query``.
    """
    n, heads, _ = query.shape
    tokens, kv_heads, _ = key.shape
    keys, values = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = torch.einsum("nhd,lhd->hnl", query.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(tokens - n, tokens, device=query.device)[:, None]
    seen = torch.arange(tokens, device=query.device)[None]
    visible = seen <= at
    if window is not None:
        visible &= seen > at - window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = sinks.double().view(-1, 1, 1).expand(-1, n, 1)
        scores = torch.cat([scores, logits], -1)
    weights = scores.softmax(-1)[..., :tokens]
    return torch.einsum("hnl,lhd->nhd", weights, values).to(query.dtype)


def spec_of(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> AttentionSpec:
    scale = head_dim**-0.5 if scale is None else scale
    return AttentionSpec(heads, kv_heads, head_dim, dtype, scale, window, softcap, sinks)


@dataclass
class World:
    """Sequences of random K and V in a cache of one layer per spec, and a backend that reads them.

    Args:
        backend: under test.
        specs: one per layer.
        cache: whose layers match the specs.
        garbage: whether memory around the sequences is made bad before each step.
    """

    backend: Backend
    specs: Sequence[AttentionSpec]
    cache: vattn.KVCache
    garbage: bool = True
    seed: int = 0
    history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.device = self.cache.device
        self.sinks = [
            # As exact in bfloat16, which some kernels take them in.
            self._normal(spec.heads).bfloat16().float().to(self.device) if spec.sinks else None
            for spec in self.specs
        ]

    def _normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(dtype)

    def open(self, slot: int | None = None) -> int:
        index = int(self.cache.open(slot=slot))
        self.history[index] = [
            (torch.empty(0, s.kv_heads, s.head_dim, dtype=s.dtype, device=self.device),) * 2
            for s in self.specs
        ]
        return index

    def fork(self, slot: int, tokens: int) -> int:
        """A new sequence with the first ``tokens`` tokens of another."""
        index = int(self.cache.fork(slot, tokens))
        self.history[index] = [(k[:tokens], v[:tokens]) for k, v in self.history[slot]]
        return index

    def release(self, slot: int) -> None:
        self.cache.mark_dirty(slot)
        self.cache.release(slot)
        del self.history[slot]

    def end(self) -> None:
        """Releases everything; no page may be left."""
        for slot in list(self.history):
            self.release(slot)
        self.cache.check()
        self.cache.trim()
        assert self.cache.pool.stats().created_bytes == 0
        self.cache.close()

    def fill(self, slot: int, tokens: int) -> None:
        """Makes an empty sequence ``tokens`` long without computing anything."""
        self.cache.ensure(slot, tokens)
        for layer, spec in enumerate(self.specs):
            shape = (tokens, spec.kv_heads, spec.head_dim)
            new = [self._normal(*shape, dtype=spec.dtype).to(self.device) for _ in range(2)]
            for target, values in zip(self.cache.layer(layer), new, strict=True):
                target[slot, :tokens] = values
            self.history[slot][layer] = (new[0], new[1])

    def tokens(self, slot: int) -> int:
        return len(self.history[slot][0][0])

    def step(
        self, decodes: Sequence[int] = (), chunks: Sequence[tuple[int, int]] = ()
    ) -> list[torch.Tensor]:
        """One step: a token for each of ``decodes``, ``n`` tokens for each ``(slot, n)``.

        Every layer's output is compared with the reference.
        """
        step = self.prepare(decodes, chunks)
        self.backend.prepare(step, self.specs)
        outs = []
        for layer, spec in enumerate(self.specs):
            query, key, value = self.inputs(step, spec)
            wanted = self.expected(step, layer, query, key, value)
            out = self.backend.forward(layer, spec, query, key, value, step, self.sinks[layer])
            self.compare(out, wanted, spec)
            outs.append(out)
        return outs

    def prepare(self, decodes: Sequence[int] = (), chunks: Sequence[tuple[int, int]] = ()) -> Step:
        new = [(slot, 1) for slot in sorted(decodes)] + list(chunks)
        slots, lens = (np.array(x, np.int32) for x in zip(*new, strict=True))
        kv_lens = np.array([self.tokens(slot) for slot in slots], np.int32) + lens
        self.cache.ensure_many(slots, kv_lens)
        if self.garbage:
            for slot, tokens, n in zip(slots, kv_lens, lens, strict=True):
                self.spoil(int(slot), int(tokens), int(n))
        return Step(self.cache, slots, lens, kv_lens, len(decodes))

    def inputs(
        self, step: Step, spec: AttentionSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = [(step.tokens, h, spec.head_dim) for h in (spec.heads, *[spec.kv_heads] * 2)]
        query, key, value = (
            self._normal(*shape, dtype=spec.dtype).to(self.device) for shape in shapes
        )
        return query, key, value

    def expected(
        self, step: Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """What one layer is to give; the new K and V join the history."""
        spec, outs, row = self.specs[layer], [], 0
        for slot, n in zip(step.slots.tolist(), step.query_lens.tolist(), strict=True):
            rows = slice(row, row + n)
            old_k, old_v = self.history[slot][layer]
            k, v = torch.cat([old_k, key[rows]]), torch.cat([old_v, value[rows]])
            self.history[slot][layer] = (k, v)
            outs.append(
                reference(
                    query[rows],
                    k,
                    v,
                    scale=spec.scale,
                    window=spec.window,
                    softcap=spec.softcap,
                    sinks=self.sinks[layer],
                )
            )
            row += n
        return torch.cat(outs)

    def compare(self, out: torch.Tensor, wanted: torch.Tensor, spec: AttentionSpec) -> None:
        assert out.shape == wanted.shape
        assert out.dtype == spec.dtype
        tolerance = TOLERANCE[spec.dtype]
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)

    def spoil(self, slot: int, tokens: int, n: int) -> None:
        """Makes the memory around a sequence of ``tokens`` tokens as bad as it may be."""
        layout = self.cache.layout
        page = layout.page_bytes
        for layer, spec in enumerate(self.specs):
            region = layout.regions[layout.places[layer][0]]
            cover = max(round_up(tokens, tile) for tile in layout.tiles)
            mapped = round_up(cover * region.token_bytes, page) // region.token_bytes
            for tensor in self.cache.layer(layer):
                tensor[slot, tokens - n : cover] = GARBAGE
                tensor[slot, cover:mapped] = torch.nan
                if spec.window is not None:
                    since = max(tokens - n - spec.window, 0)
                    lowest = min(since // tile * tile for tile in layout.tiles)
                    tensor[slot, self.cache.first_token(slot, layer) : lowest] = torch.nan


def make_world(
    backend: Backend,
    specs: Sequence[AttentionSpec],
    *,
    strict: bool = True,
    order: Order = "head",
    tile: int | Sequence[int] | None = None,
    max_seqs: int = 8,
    max_tokens: int = 400,
    page_bytes: int = 4096,
    device: str = "cpu",
    layers_per_region: int | None = None,
    garbage: bool | None = None,
    seed: int = 0,
) -> World:
    """A world on a cache of its own, strict by default: what is not mapped faults.

    Memory is made bad only where it is strict, unless ``garbage`` says otherwise.
    """
    layers = [vattn.LayerSpec(s.kv_heads, s.head_dim, s.dtype, s.window) for s in specs]
    cache = vattn.KVCache(
        layers,
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        device=device,
        strict=strict,
        order=order,
        page_bytes=page_bytes,
        layers_per_region=layers_per_region,
        kv_tile_tokens=backend.kv_tile_tokens if tile is None else tile,
    )
    return World(backend, specs, cache, seed=seed, garbage=strict if garbage is None else garbage)


def variants(base: AttentionSpec) -> dict[str, AttentionSpec]:
    """The kinds of attention that models have."""
    return {
        "gqa": base,
        "mha": replace(base, kv_heads=base.heads),
        "mqa": replace(base, kv_heads=1),
        "scale": replace(base, scale=0.07),
        "window": replace(base, window=37),
        "softcap": replace(base, softcap=5.0),
        "sinks": replace(base, sinks=True),
        "window_sinks": replace(base, window=37, sinks=True),
        "window_softcap": replace(base, window=37, softcap=5.0),
    }
