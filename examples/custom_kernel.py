"""Your own attention kernel on vattn.KVCache: it gets pointers and strides, and no block table.

Run: python examples/custom_kernel.py   (TRITON_INTERPRET=1 runs the Triton kernel on a CPU)
"""

import os

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vattn import KVCache, LayerSpec

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
if TRITON := DEVICE == "cuda" or INTERPRET:  # PyTorch for CUDA brings it; else: pip install triton
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def decode(q, k, v, out, slots, lens, slot_stride, token_stride, head_stride, D: tl.constexpr):  # type: ignore[no-untyped-def]
        # The strides are those of k and v, in elements. A cache may have more than 2**31 of them.
        row, head, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, D)
        start = tl.load(slots + row).to(tl.int64) * slot_stride + head * head_stride
        mine = (row * tl.num_programs(1) + head) * D + d
        query, length = tl.load(q + mine), tl.load(lens + row)
        best, total, acc = -float("inf"), 0.0, tl.zeros([D], tl.float32)
        for first in range(0, length, 64):  # softmax, 64 tokens at a time
            t = first + tl.arange(0, 64)
            at = start + t[:, None].to(tl.int64) * token_stride + d[None, :]
            scores = tl.sum(tl.load(k + at, t[:, None] < length, 0.0) * query[None, :], 1)
            scores = tl.where(t < length, scores, -float("inf"))
            top = tl.maximum(best, tl.max(scores, 0))
            p, fade = tl.exp(scores - top), tl.exp(best - top)
            acc = acc * fade + tl.sum(tl.load(v + at, t[:, None] < length, 0.0) * p[:, None], 0)
            best, total = top, total * fade + tl.sum(p, 0)
        tl.store(out + mine, acc / total)


cache = KVCache([LayerSpec(4, 32, torch.float32)], max_seqs=8, max_tokens=4096, device=DEVICE)
k, v = cache.layer(0)  # [slots, tokens, heads, dim]; mapped where a sequence has tokens
slots = [int(cache.open()) for _ in range(3)]
cache.ensure_many(slots, [10, 127, 600])  # maps what the prompts need
for slot, n in zip(slots, [10, 127, 600], strict=True):
    k[slot, :n], v[slot, :n] = torch.randn(2, n, 4, 32, device=DEVICE)
slots.append(int(cache.fork(slots[2])))  # shares full pages, and copies the last one
cache.ensure_many(slots, lens := [11, 128, 601, 601])  # and a place for the next token
at = torch.tensor([slots, lens], dtype=torch.int32, device=DEVICE)
q, k[at[0], at[1] - 1], v[at[0], at[1] - 1] = torch.randn(3, 4, 4, 32, device=DEVICE)
q, out = q * 32**-0.5, torch.empty_like(q)  # [sequences, heads, dim]
if TRITON:  # a dim that is a power of two, a head of k for each of q, no length of 0
    assert (q.is_contiguous(), k.stride(), k.shape[2:]) == (True, v.stride(), q.shape[1:])
    decode[q.shape[:2]](q, k, v, out, *at, *k.stride()[:3], D=32)
for row, (slot, n) in enumerate(at.T.tolist()):
    if not TRITON:
        weights = torch.einsum("hd,nhd->nh", q[row], k[slot, :n]).softmax(0)
        out[row] = torch.einsum("nh,nhd->hd", weights, v[slot, :n])
    keys, values = (part.transpose(0, 1) for part in cache.view(slot, 0))
    assert torch.allclose(out[row], sdpa(q[row, :, None], keys, values, scale=1)[:, 0], atol=1e-4)
print("Triton" if TRITON else "torch", "agrees with SDPA;", cache.stats().driver_calls)
