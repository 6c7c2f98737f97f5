"""Sequences in a cache of blocks, with a plain reference for what kernels make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.paged.backends import PagedBackend
from bench.paged.cache import PagedCache
from bench.paged.kernels import PagedKernel
from tests.attention_reference import GARBAGE, World
from vattn.attention.base import AttentionSpec, Step
from vattn.kv.layout import LayerSpec


class PagedWorld(World):
    """Sequences in a cache of blocks, whose free blocks come in random order."""

    cache: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in range(len(self.specs)):
            for tensor in self.cache.layer(layer):
                tensor.fill_(GARBAGE)
        # Take every block, and give them back in another order.
        slots = [self.cache.open() for _ in range(self.cache.max_seqs)]
        for i in range(self.cache.blocks.free):
            slot = slots[i % len(slots)]
            tokens = (int(self.cache.counts[slot]) + 1) * self.cache.block_tokens
            if tokens <= self.cache.max_tokens:
                self.cache.ensure([slot], [tokens])
        random = np.random.default_rng(self.seed)
        for slot in random.permutation(slots):
            while self.cache.tokens(int(slot)):
                self.cache.truncate(
                    int(slot), max(0, self.cache.tokens(int(slot)) - self.cache.block_tokens)
                )
            self.cache.release(int(slot))

    def fork(self, slot: int, tokens: int) -> int:
        """A new sequence that shares the blocks of another's first tokens, whole ones."""
        size = self.cache.block_tokens
        assert tokens % size == 0
        index = self.open()
        blocks = self.cache.blocks_of(slot)[: tokens // size]
        self.cache.blocks.share(blocks)
        self.cache.hold(index, blocks, tokens)
        self.history[index] = [(k[:tokens], v[:tokens]) for k, v in self.history[slot]]
        return index

    def release(self, slot: int) -> None:
        self.cache.release(slot)
        del self.history[slot]

    def end(self) -> None:
        """Releases everything; no block may be left."""
        for slot in list(self.history):
            self.release(slot)
        self.cache.check()
        assert self.cache.blocks.live == 0
        self.cache.close()

    def prepare(self, decodes: Sequence[int] = (), chunks: Sequence[tuple[int, int]] = ()) -> Step:
        new = [(slot, 1) for slot in sorted(decodes)] + list(chunks)
        slots, lens = (np.array(x, np.int32) for x in zip(*new, strict=True))
        kv_lens = np.array([self.tokens(slot) for slot in slots], np.int32) + lens
        self.cache.ensure(slots, kv_lens)
        return Step(self.cache, slots, lens, kv_lens, len(decodes))


def paged_world(
    backend: PagedBackend,
    specs: Sequence[AttentionSpec],
    *,
    block_tokens: int,
    max_seqs: int = 8,
    max_tokens: int = 600,
    seed: int = 0,
) -> PagedWorld:
    """A world on a cache of its own."""
    cache = PagedCache(
        [LayerSpec(s.kv_heads, s.head_dim, s.dtype, s.window) for s in specs],
        device="cpu",
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        num_blocks=1 + max_seqs * -(-max_tokens // block_tokens),
        block_tokens=block_tokens,
    )
    return PagedWorld(backend, specs, cache, seed=seed)  # type: ignore[arg-type]


def world_of(
    kernel: PagedKernel, specs: Sequence[AttentionSpec], block_tokens: int, **options: Any
) -> PagedWorld:
    backend = PagedBackend(kernel, specs, torch.device("cpu"))
    return paged_world(backend, specs, block_tokens=block_tokens, **options)


def run_mixed_steps(world: PagedWorld) -> None:
    """Prompts, decodes, both together, shared blocks, slots that are used again."""
    size = world.cache.block_tokens
    a, b, c, d = (world.open(slot) for slot in (5, 1, 6, 2))
    world.step((), [(a, 300), (b, 7)])  # slots in no order
    world.step((), [(c, 130)])
    for _ in range(3):
        world.step([a, b, c])
    world.step([a, c], [(d, 50), (b, 20)])
    world.step([a], [(b, 60)])
    if size <= 300:
        e = world.fork(a, 300 // size * size)
        world.step([a, e])
        world.step([a], [(e, 40)])
        world.release(a)  # what it shared stays
        world.step([b, c, d, e])
    else:
        world.release(a)
    f = world.open(5)
    world.step([b, d], [(f, size)])
    world.step([b, d, f])
    world.end()
