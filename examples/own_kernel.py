"""Your own attention on plain tensors: decode of several sequences of different lengths.

The cache hands out ordinary strided tensors. Nothing here knows about pages.

Run: python examples/own_kernel.py
"""

import torch

import vattn

HEADS, HEAD_DIM = 4, 32


def my_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query per head, ``[heads, dim]``, against ``[tokens, heads, dim]`` keys and values."""
    scores = torch.einsum("hd,thd->ht", q, k) / HEAD_DIM**0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def main() -> None:
    torch.manual_seed(0)
    cache = vattn.KVCache(
        layers=2,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        max_seqs=4,
        max_tokens=4096,
    )
    sequences = {cache.open(): length for length in (10, 700, 3000)}
    for seq, length in sequences.items():
        cache.ensure(seq, length)  # maps pages for the prompt
        for layer in range(2):
            k, v = cache.view(seq, layer)
            k.normal_()
            v.normal_()

    branch = cache.fork(max(sequences, key=lambda s: sequences[s]))  # shares all full pages
    sequences[branch] = 3000
    for seq, length in sequences.items():
        cache.ensure(seq, length + 1)  # one more token each
        k, v = cache.view(seq, 0)
        k[-1].normal_()
        v[-1].normal_()
        out = my_attention(torch.randn(HEADS, HEAD_DIM), k, v)
        print(f"{seq}: {k.shape[0]} tokens, |out| = {out.norm():.3f}")

    stats = cache.stats()
    print(f"shared pages: {stats.shared_bytes >> 10} KiB of {stats.live_bytes >> 10} KiB live")
    cache.check()


if __name__ == "__main__":
    main()
