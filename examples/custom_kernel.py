"""Your own attention kernel on vattn.KVCache: it gets pointers and strides, and no block table.

Run: python examples/custom_kernel.py   (TRITON_INTERPRET=1 runs the Triton kernel on a CPU)
"""

import os

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vattn import KVCache, LayerSpec

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
if TRITON := DEVICE == "cuda" or INTERPRET:  # PyTorch for CUDA brings it
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def decode(q, k, v, out, slots, lens, slot, token, head, D: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
        row, h, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, D)
        start = tl.load(slots + row).to(tl.int64) * slot + h * head + d[None, :]
        mine, n = (row * tl.num_programs(1) + h) * D + d, tl.load(lens + row)
        query, acc = tl.load(q + mine)[None, :], tl.zeros([D], tl.float32)
        best, total = -float("inf"), 0.0
        for first in range(0, n, B):  # softmax, B tokens at a time
            t = first + tl.arange(0, B)
            at, there = start + t.to(tl.int64)[:, None] * token, t[:, None] < n
            scores = tl.where(t < n, tl.sum(tl.load(k + at, there, 0.0) * query, 1), -float("inf"))
            top = tl.maximum(best, tl.max(scores, 0))
            p, fade = tl.exp(scores - top), tl.exp(best - top)
            acc = acc * fade + tl.sum(tl.load(v + at, there, 0.0) * p[:, None], 0)
            best, total = top, total * fade + tl.sum(p, 0)
        tl.store(out + mine, acc / total)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    q, out = q * q.shape[-1] ** -0.5, torch.empty_like(q)  # [n, heads, dim]
    if TRITON:
        decode[q.shape[:2]](q, k, v, out, *at, *k.stride()[:3], D=q.shape[-1], B=64)
        return out
    for i, (slot, n) in enumerate(at.T.tolist()):
        out[i] = ((k[slot, :n] * q[i]).sum(-1, keepdim=True).softmax(0) * v[slot, :n]).sum(0)
    return out


cache = KVCache([LayerSpec(4, 32, torch.float32)], max_seqs=8, max_tokens=4096, device=DEVICE)
k, v = cache.layer(0)  # [slots, tokens, heads, dim]; mapped where a sequence has tokens
cache.ensure_many(slots := [int(cache.open()) for _ in range(3)], [10, 127, 600])  # prompts
for part in (part for slot in slots for part in cache.view(slot, 0)):
    part.normal_()
slots.append(int(cache.fork(slots[2])))  # shares full pages, and copies the last one
cache.ensure_many(slots, lens := [11, 128, 601, 601])  # a place for the next token
at = torch.tensor([slots, lens], dtype=torch.int32, device=DEVICE)
q, k[at[0], at[1] - 1], v[at[0], at[1] - 1] = torch.randn(3, 4, 4, 32, device=DEVICE)
for slot, x, out in zip(at[0].tolist(), q, attend(q, k, v, at), strict=True):
    keys, values = (part.transpose(0, 1) for part in cache.view(slot, 0))
    torch.testing.assert_close(out, sdpa(x[:, None], keys, values)[:, 0], atol=1e-4, rtol=0)
print("Triton" if TRITON else "torch", "agrees with SDPA;", cache.stats().driver_calls)
