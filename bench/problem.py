"""One attention call over slots, what it should give, and SDPA, which a CPU has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Attend = Callable[[], torch.Tensor]  # gives [batch, queries, heads, head_dim]


@dataclass(frozen=True)
class Problem:
    """Queries over slots: sequence ``i`` is the first ``lengths[i]`` tokens of ``slots[i]``.

    Its queries are its last tokens: query ``j`` sees tokens up to ``lengths[i] - queries + j``.
    """

    q: torch.Tensor  # [batch, queries, heads, head_dim]
    slots: Sequence[int]
    lengths: Sequence[int]

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def queries(self) -> int:
        return self.q.shape[1]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def causal(self) -> bool:
        return self.queries > 1

    def int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def offsets_q(self) -> torch.Tensor:
        return self.int32([i * self.queries for i in range(self.batch + 1)])

    def offsets_k(self, slot_tokens: int, slots: int) -> torch.Tensor:
        """Where each sequence starts in the flat view; the last entry is the end of the view."""
        return self.int32([*(slot * slot_tokens for slot in self.slots), slots * slot_tokens])


def flat(kv: torch.Tensor) -> torch.Tensor:
    """``[slots, slot_tokens, heads, dim]`` as ``[slots * slot_tokens, heads, dim]``, no copy.

    Raises:
        RuntimeError: in head order, which has no flat view.
    """
    return kv.view(-1, *kv.shape[2:])


def reference(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same in float32, one sequence after the other, from no more than its own tokens."""
    outs = []
    for i, (slot, length) in enumerate(zip(problem.slots, problem.lengths, strict=True)):
        q = problem.q[i].float()
        q = q.view(problem.queries, k.shape[2], -1, k.shape[3])  # [queries, kv_heads, group, dim]
        keys, values = k[slot, :length].float(), v[slot, :length].float()
        scores = torch.einsum("qhgd,khd->hgqk", q, keys) * problem.scale
        if problem.causal:
            row = torch.arange(problem.queries, device=q.device)[:, None]
            last = row + length - problem.queries
            hidden = torch.arange(length, device=q.device)[None, :] > last
            scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), values)
        outs.append(out.flatten(1, 2))
    return torch.stack(outs)


def prepare_sdpa(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
    """Neighbouring slots of one length are one SDPA call, so nothing between them is read."""
    groups = [
        list(group)
        for _, group in itertools.groupby(
            range(problem.batch), lambda i: (problem.slots[i] - i, problem.lengths[i])
        )
    ]
    out = torch.empty_like(problem.q)
    calls = [_sdpa_group(problem, group, k, v, out) for group in groups]

    def attend() -> torch.Tensor:
        for call in calls:
            call()
        return out

    return attend


def _sdpa_group(
    problem: Problem, group: Sequence[int], k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> Callable[[], object]:
    _, queries, heads, dim = problem.q.shape
    first, n = group[0], len(group)
    slot, length = problem.slots[first], problem.lengths[first]
    kv_heads = k.shape[2]
    # Query heads that share a KV head become further queries of it: no copy of K and V.
    shape = (n, queries, kv_heads, heads // kv_heads, dim)
    packed = (n, kv_heads, heads // kv_heads * queries, dim)
    q = problem.q[first : first + n].view(shape).permute(0, 2, 3, 1, 4).reshape(packed)
    keys = k[slot : slot + n, :length].transpose(1, 2)
    values = v[slot : slot + n, :length].transpose(1, 2)
    mask = None
    if problem.causal:
        row = torch.arange(queries, device=q.device)[:, None] + length - queries
        mask = torch.arange(length, device=q.device)[None, :] <= row
        mask = mask.repeat(heads // kv_heads, 1)
    target = out[first : first + n].view(shape).permute(0, 2, 3, 1, 4)

    def call() -> object:
        result = F.scaled_dot_product_attention(q, keys, values, mask, scale=problem.scale)
        return target.copy_(result.view(n, kv_heads, heads // kv_heads, queries, dim))

    return call
