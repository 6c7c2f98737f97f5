"""The baseline's memory under the scheduler's model: tokens are written to blocks and read back.

What a slot holds is read as a kernel would, through the block table on the device, so a block that
was shared, copied, freed or named wrongly changes the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.paged.cache import PagedCache
from bench.paged.memory import PagedMemory
from vattn.kv.layout import LayerSpec, Order
from vattn.request import Request

SPECS = [LayerSpec(1, 8, torch.float32), LayerSpec(2, 8, torch.float16, 5)]


def make_paged(
    blocks: int, *, block_tokens: int = 4, slots: int = 4, max_tokens: int = 64, order: Order
) -> PagedCache:
    """A cache of two layers that differ, with so many blocks that can be used."""
    return PagedCache(
        SPECS,
        device="cpu",
        max_seqs=slots,
        max_tokens=max_tokens,
        num_blocks=blocks + 1,
        block_tokens=block_tokens,
        order=order,
    )


def write(cache: PagedCache, slot: int, first: int, tokens: list[int]) -> None:
    """Puts tokens where their K and V go, in every layer."""
    if tokens:
        index = _index(cache, slot, first, first + len(tokens))
        values = torch.tensor(tokens)[:, None, None]
        for tensor in tensors(cache):
            tensor[index] = values.to(tensor.dtype).expand(-1, *tensor.shape[2:])


def read(cache: PagedCache, slot: int, tokens: int, *, sent: bool = True) -> list[int]:
    """The first tokens of a slot; every layer, K and V, and every element says the same.

    Unless the table was ``sent`` it is read on the host, where it may be ahead.
    """
    if not tokens:
        return []
    index = _index(cache, slot, 0, tokens, sent=sent)
    found = torch.cat([tensor[index].flatten(1).double() for tensor in tensors(cache)], 1)
    assert (found == found[:, :1]).all(), (slot, found)
    out: list[int] = found[:, 0].long().tolist()
    return out


def tensors(cache: PagedCache) -> list[torch.Tensor]:
    """K and V of all layers, each as ``[blocks, block_tokens, heads, dim]``."""
    every = [tensor for layer in range(len(cache.specs)) for tensor in cache.layer(layer)]
    return every if cache.order == "token" else [tensor.movedim(0, 2) for tensor in every]


def _index(
    cache: PagedCache, slot: int, first: int, last: int, *, sent: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(first, last)
    table = cache.tables.device if sent else torch.from_numpy(cache.tables.host)
    blocks = table[slot, positions // cache.block_tokens]
    return blocks.long(), positions % cache.block_tokens


def assert_no_block_lost(memory: PagedMemory) -> None:
    """Nobody holds a block, and all that there are can be taken."""
    cache = memory.cache
    memory.check()
    assert cache.blocks.held() == []
    cache.blocks.set_limit(cache.num_blocks - 1)
    memory.reset_prefix_cache()
    assert cache.blocks.kept == 0
    every = cache.blocks.take(cache.num_blocks - 1)
    assert sorted(every) == list(range(1, cache.num_blocks))
    cache.blocks.drop(every)
    memory.check()


@dataclass
class Slot:
    """One open slot as the model of an engine sees it."""

    memory: ModelledMemory
    slot: int
    request: Request

    @property
    def pages(self) -> list[int]:
        return self.memory.cache.blocks_of(self.slot)

    @property
    def content(self) -> list[int]:
        return read(self.memory.cache, self.slot, self.memory.written[self.slot])

    @content.setter
    def content(self, tokens: list[int]) -> None:
        known = self.content
        assert tokens[: len(known)] == known
        write(self.memory.cache, self.slot, len(known), tokens[len(known) :])
        self.memory.written[self.slot] = len(tokens)


class ModelledMemory(PagedMemory):
    """A real memory manager with what :class:`tests.scheduler_model.FakeEngine` looks at.

    ``fail_grows`` makes so many calls of ``grow`` fail, and ``fail_reorders`` of ``reorder``.
    """

    def __init__(self, cache: PagedCache, budget: int, *, prefixes: bool = True) -> None:
        super().__init__(cache, prefix_caching=prefixes)
        self.budget = budget
        self.fail_grows = self.fail_reorders = self.swapped = 0
        self.written: dict[int, int] = {}

    @property
    def budget(self) -> int:
        """In blocks."""
        return self.cache.blocks.limit

    @budget.setter
    def budget(self, blocks: int) -> None:
        self.cache.blocks.set_limit(blocks)

    @property
    def open(self) -> dict[int, Slot]:
        return {slot: Slot(self, slot, held.request) for slot, held in self._held.items()}

    @property
    def references(self) -> dict[int, int]:
        return {block: self.cache.blocks.holders(block) for block in self.cache.blocks.held()}

    def pages_for(self, tokens: int) -> int:
        return self.cache.blocks_for(tokens)

    def admit(self, request: Request) -> bool | None:
        admitted = super().admit(request)
        if admitted:
            self.written[request.slot] = request.computed
        return admitted

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        if self.fail_grows:
            self.fail_grows -= 1
            return False
        return super().grow(slots, tokens)

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        super().cut(request, spoiled=spoiled)
        self.written[request.slot] = min(self.written[request.slot], request.computed)

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        if self.fail_reorders:
            self.fail_reorders -= 1
            return False
        before = [read(self.cache, source, self.written[source]) for source in sources]
        copied = self.cache.copied_bytes
        if not super().reorder(slots, sources):
            assert self.cache.copied_bytes == copied
            return False
        for slot, source, content in zip(slots, sources, before, strict=True):
            self.written[slot] = self.written[source]
            assert read(self.cache, slot, self.written[slot]) == content
        return True

    def check(self) -> None:
        super().check()
        assert self.written.keys() >= self._held.keys()
        for slot, held in self._held.items():
            known, computed = held.request.tokens, held.request.computed
            computed = min(computed, self.written[slot], len(known))
            found = read(self.cache, slot, computed, sent=False)
            assert found == known[:computed], held.request
