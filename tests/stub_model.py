"""A model without weights whose next token depends on every byte that the cache holds for it.

It writes each token's id into K and V and computes the next token from what it reads back, so that
a page that is lost, mixed up or written by somebody else changes the text. What the text must be
follows from the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vattn.attention.base import AttentionSpec
from vattn.engine.batch import SAMPLED, StepBatch
from vattn.engine.runner import GraphStats
from vattn.kv.cache import KVCache
from vattn.kv.layout import LayerSpec

VOCABULARY = 997
HEADS, DIM = 2, 8
WINDOW = 12


class StubModel:
    """What an engine asks of a loaded model: two layers, one of them with a window if wanted."""

    def __init__(self, *, max_positions: int = 128, window: bool = False) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.model: Any = None  # StubRunner computes
        self.vocab_size = VOCABULARY
        self.max_positions = max_positions
        self.eos_token_ids: frozenset[int] = frozenset()
        self.generation_defaults: dict[str, Any] = {}
        self.windows = (None, WINDOW if window else None)
        self.specs = [
            AttentionSpec(HEADS, HEADS, DIM, torch.float32, 1.0, window=w) for w in self.windows
        ]

    def layer_specs(self) -> list[LayerSpec]:
        return [LayerSpec(HEADS, DIM, torch.float32, w) for w in self.windows]


def mix(tokens: Any, positions: Any) -> Any:
    """A number for each token at each position; for arrays of int64."""
    return (tokens * 7919 + positions * 104729 + 12345) % 1_000_003


def expected_tokens(prompt: list[int], n: int, window: bool = False) -> list[int]:
    """The `n` tokens that follow a prompt."""
    tokens = list(prompt)
    total = sum(mix(t, i) for i, t in enumerate(tokens))
    for _ in range(n):
        recent = 0
        if window:
            first = max(0, len(tokens) - WINDOW)
            recent = sum(mix(t, i) for i, t in enumerate(tokens[first:], first))
        token = (total + 31 * recent) % VOCABULARY
        total += mix(token, len(tokens))
        tokens.append(token)
    return tokens[len(prompt) :]


class StubRunner:
    """Takes the place of an engine's runner.

    Args:
        cache: of the engine.
        before: called at the start of every step; may raise.
    """

    def __init__(self, cache: KVCache, before: Callable[[], None] = lambda: None) -> None:
        self.cache = cache
        self.before = before
        self.window = any(spec.window for spec in cache.specs)
        self.layers = [cache.layer(i) for i in range(len(cache.specs))]
        self.last_token = torch.full((cache.max_seqs,), -7, dtype=torch.int64)

    graph_stats = GraphStats(captured=0, replayed=0, eager=0, padded_rows=0)

    def run(self, batch: StepBatch) -> torch.Tensor:
        self.before()
        slots, query_lens, kv_lens = batch.slots, batch.query_lens, batch.kv_lens
        num_decodes, logit_rows = batch.num_decodes, batch.logit_rows
        input_ids = self._known(batch)
        assert (query_lens[:num_decodes] == 1).all()
        assert (np.diff(slots[:num_decodes]) > 0).all(), slots
        ends = np.cumsum(query_lens)
        for slot, n, length, end in zip(slots, query_lens, kv_lens, ends, strict=True):
            self._write(int(slot), int(length - n), input_ids[end - n : end])
        at = {int(end) - 1: i for i, end in enumerate(ends)}
        logits = torch.zeros(len(logit_rows), VOCABULARY)
        for row, place in enumerate(logit_rows.tolist()):
            i = at[place]
            logits[row, self._next(int(slots[i]), int(kv_lens[i]))] = 1.0
        return logits

    def remember(self, batch: StepBatch, token_ids: torch.Tensor) -> None:
        self.last_token[torch.from_numpy(batch.sample_slots)] = token_ids

    def _known(self, batch: StepBatch) -> Any:
        """The new tokens, those included that the host has not seen."""
        ids = batch.input_ids.copy()
        assert (ids[batch.num_decodes :] != SAMPLED).all()
        last = self.last_token.numpy()[batch.slots[: batch.num_decodes]]
        ahead = ids[: batch.num_decodes] == SAMPLED
        ids[: batch.num_decodes][ahead] = last[ahead]
        return ids

    def _write(self, slot: int, first: int, ids: Any) -> None:
        data = torch.from_numpy(np.asarray(ids)).float()[:, None, None]
        for k, v in self.layers:
            k[slot, first : first + len(ids)] = data
            v[slot, first : first + len(ids)] = -data

    def _next(self, slot: int, length: int) -> int:
        total = self._read(0, slot, 0, length)
        recent = 0
        if self.window:
            recent = self._read(1, slot, max(0, length - WINDOW), length)
        else:
            assert self._read(1, slot, 0, length) == total, f"layers of slot {slot} differ"
        return (total + 31 * recent) % VOCABULARY

    def _read(self, layer: int, slot: int, first: int, last: int) -> int:
        k, v = self.layers[layer]
        seen = k[slot, first:last].flatten(1)
        assert torch.equal(seen, -v[slot, first:last].flatten(1)), f"K and V of slot {slot} differ"
        ids = seen[:, 0]
        assert torch.equal(seen, ids[:, None].expand_as(seen)), f"heads of slot {slot} differ"
        positions = np.arange(first, last)
        return int(mix(ids.numpy().astype(np.int64), positions).sum())
