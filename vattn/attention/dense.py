"""Attention over strided K and V without copying them, on whatever device torch has.

All functions take queries ``[B, heads, n, head_dim]`` and keys and values ``[B, kv_heads, L,
head_dim]`` with any strides but a last one of 1, and an additive float32 mask that broadcasts to
``[B, 1, n, L]``. Masked positions are still multiplied: they must hold finite numbers.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Scores of one matmul on the path that writes them to memory: 16 MiB of float32.
_MOST_SCORES = 1 << 22


def tells_lse(device: torch.device) -> bool:
    """Whether :func:`attend` returns the log-sum-exp."""
    return device.type == "cpu"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fused attention; query heads share K and V by groups.

    Args:
        query: as the module says.
        key: likewise.
        value: likewise.
        scale: of the scores.
        mask: as the module says.
        causal: query ``i`` sees keys ``0..i``.

    Returns:
        Output ``[B, heads, n, head_dim]`` and the scores' log-sum-exp, float32 ``[B, heads, n]``;
        None where torch does not tell it.
    """
    if tells_lse(query.device):
        # The kernel beneath torch's public function: it alone tells the log-sum-exp. It reads a
        # mask as float32 or as the queries' dtype, and for float64 without looking.
        if mask is not None and query.dtype == torch.float64:
            mask = mask.double()
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    return _attend_elsewhere(query, key, value, scale, mask, causal), None


def _attend_elsewhere(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """The public function. Most of its kernels repeat K and V for groups; strides of 0 do not.

    A batch dimension beside KV heads and groups would be one too many, so it goes one by one.
    """
    if mask is not None:
        mask = mask.to(query.dtype)
    if query.shape[1] == key.shape[1]:
        out: torch.Tensor = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
        return out
    out = torch.empty_like(query)
    kv_heads = key.shape[1]
    group = query.shape[1] // kv_heads
    for b in range(query.shape[0]):
        out[b] = functional.scaled_dot_product_attention(
            query[b].view(kv_heads, group, *query.shape[2:]),
            key[b].unsqueeze(1).expand(-1, group, -1, -1),
            value[b].unsqueeze(1).expand(-1, group, -1, -1),
            attn_mask=mask if mask is None or mask.shape[0] != len(query) else mask[b],
            is_causal=causal,
            scale=scale,
        ).flatten(0, 1)
    return out


def merge(
    first: tuple[torch.Tensor, torch.Tensor | None],
    second: tuple[torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from that over each (of a CPU)."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    assert lse_a is not None
    assert lse_b is not None
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(-1).to(out_a.dtype)
    return torch.lerp(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Lets a logit per head, ``sinks`` broadcasting to ``lse``, join a finished softmax."""
    return out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1).to(out.dtype)


def attend_by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What no fused kernel of torch computes: soft-capped scores, and sinks away from the CPU.

    A batched matmul takes one batch dimension of any stride; folding two of them into one copies.
    So this loops over the shorter of B and kv_heads.

    Args:
        query: as the module says.
        key: likewise.
        value: likewise.
        scale: of the scores.
        mask: as the module says.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[heads]``.
    """
    batch, heads, n, dim = query.shape
    kv_heads = key.shape[1]
    out = torch.empty_like(query)
    grouped = query.view(batch, kv_heads, heads // kv_heads, n, dim)
    result = out.view(grouped.shape)
    by_group = None if sinks is None else sinks.float().view(kv_heads, -1)
    if kv_heads <= batch:
        for h in range(kv_heads):
            logits = None if by_group is None else by_group[h].view(1, -1, 1, 1)
            result[:, h] = _by_matmul(
                grouped[:, h], key[:, h], value[:, h], scale, mask, softcap, logits
            )
        return out
    for b in range(batch):
        own = None if mask is None else mask[b : b + 1] if mask.shape[0] == batch else mask
        logits = None if by_group is None else by_group.view(kv_heads, -1, 1, 1)
        result[b] = _by_matmul(grouped[b], key[b], value[b], scale, own, softcap, logits)
    return out


def _by_matmul(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``query [M, group, n, d]`` over ``key, value [M, L, d]``: ``[M, group, n, d]``."""
    many, group, n, dim = query.shape
    scores = torch.bmm(query.reshape(many, group * n, dim), key.transpose(1, 2))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.view(many, group, n, -1).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        logits = sinks.expand(many, group, n, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), logits)
        weights = scores.sub_(top).exp_()
        weights /= weights.sum(-1, keepdim=True) + torch.exp(logits - top)
    weights = weights.to(value.dtype).view(many, group * n, -1)
    return torch.bmm(weights, value).view(query.shape)


def rows_that_fit(heads_per_kv: int, keys: int) -> int:
    """Queries of one call of :func:`attend_by_matmul` per sequence, so that scores stay small."""
    return max(1, _MOST_SCORES // (heads_per_kv * keys))
