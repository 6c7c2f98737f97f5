"""What the tests of the cache share: pools, small layouts, and the bytes of tokens.

A token's bytes are a function of who wrote it (`writer`), its position, the layer, and K or V, so a
page that shows up in the wrong place, or with somebody else's contents, never compares equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import vattn
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from tests.fake_cuda.fake import FakeCuda
    from vattn.kv.layout import Order

    Bytes = npt.NDArray[np.uint8]

SMALL_PAGE = 4096

# Of the native calls, those that change mappings or memory. Events are left out: a release records
# one, which is how later users know that the slot's kernels are done.
MEMORY_OPS = ("create", "destroy", "map", "set_access", "unmap", "reserve", "release")


# Pools and caches -------------------------------------------------------------------------------


def torch_device(driver: _core.Driver) -> str:
    kind, index = driver.dlpack_device()
    return f"cuda:{index}" if kind == 2 else "cpu"


def make_pool(
    driver: _core.Driver, *, pages: int = 4096, page_bytes: int | None = None, ahead_pages: int = 0
) -> vattn.PagePool:
    """A pool with a budget of so many pages, of the smallest size unless another is given."""
    size = page_bytes or driver.granularity()
    return vattn.PagePool(
        torch_device(driver),
        driver=driver,
        page_bytes=size,
        budget_bytes=pages * size,
        ahead_bytes=ahead_pages * size,
    )


def layer_specs(
    pool: vattn.PagePool,
    layers: int = 3,
    *,
    kv_heads: int = 1,
    head_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
) -> list[vattn.LayerSpec]:
    """Equal layers whose tokens are as large against the pool's pages as against small ones.

    With the defaults no number of tokens fills a page exactly before the slot ends: in token order
    a page holds 7.1 tokens of three layers, in head order 42.7 of one head.
    """
    scale = pool.page_bytes // SMALL_PAGE
    return [vattn.LayerSpec(kv_heads, head_dim * scale, dtype, window)] * layers


def make_cache(
    pool: vattn.PagePool,
    specs: Sequence[vattn.LayerSpec] | None = None,
    *,
    max_seqs: int = 4,
    max_tokens: int = 100,
    order: Order = "token",
    layers_per_region: int | None = None,
    tile: int | Sequence[int] = 1,
    reuse_stale: bool = True,
) -> vattn.KVCache:
    """A small cache; `check()` it and release what it holds before the test ends."""
    specs = layer_specs(pool) if specs is None else specs
    return vattn.KVCache(
        specs,
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        pool=pool,
        order=order,
        layers_per_region=layers_per_region or len(specs),
        kv_tile_tokens=tile,
        reuse_stale=reuse_stale,
    )


# Bytes ------------------------------------------------------------------------------------------


def token_bytes(
    writers: Sequence[int], first: int, width: int, layer: int, which: Literal["k", "v"]
) -> Bytes:
    """The bytes `[len(writers), width]` of tokens `first` and on of one layer's K or V.

    Shared by all that ask for them: leave them as they are.
    """
    return _token_bytes(tuple(writers), first, width, layer, which)


@functools.lru_cache(maxsize=1024)
def _token_bytes(
    writers: tuple[int, ...], first: int, width: int, layer: int, which: Literal["k", "v"]
) -> Bytes:
    writer = np.asarray(writers, dtype=np.uint32)
    token = np.arange(first, first + len(writer), dtype=np.uint32)
    part = np.uint32(2 * layer + (which == "v"))
    seed = writer * np.uint32(40503) + token * np.uint32(2654435761) + part * np.uint32(97003)
    position = np.arange(width, dtype=np.uint32) * np.uint32(668265263)
    mixed = (seed[:, None] ^ (seed[:, None] >> np.uint32(15))) + position
    out: Bytes = (mixed >> np.uint32(11)).astype(np.uint8)
    return out


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as `[tokens, kv_heads, bytes]`."""
    return tensor.view(torch.uint8)


def write_tokens(
    cache: vattn.KVCache, slot: vattn.Slot | int, writer: int, first: int, last: int
) -> None:
    """Writes tokens [first, last) of every layer as `writer` does."""
    for layer in range(len(cache.specs)):
        start = cache.first_token(slot, layer)
        for which, view in zip(("k", "v"), cache.view(slot, layer), strict=True):
            begin = max(first, start)
            target = as_bytes(view[begin - start : last - start])
            width = target.shape[1] * target.shape[2]
            data = token_bytes([writer] * (last - begin), begin, width, layer, _kv(which))
            target.copy_(torch.from_numpy(data).view(target.shape))


def assert_tokens(
    cache: vattn.KVCache, slot: vattn.Slot | int, writers: Sequence[int], context: object = ""
) -> None:
    """Every token that the sequence still holds has its writer's bytes, in every layer."""
    assert cache.tokens(slot) == len(writers), context
    for layer in range(len(cache.specs)):
        start = cache.first_token(slot, layer)
        for which, view in zip(("k", "v"), cache.view(slot, layer), strict=True):
            seen = as_bytes(view).flatten(1).cpu().numpy()
            wanted = token_bytes(writers[start:], start, seen.shape[1], layer, _kv(which))
            if not np.array_equal(seen, wanted):
                bad = start + np.flatnonzero((seen != wanted).any(axis=1))
                raise AssertionError(
                    f"slot {int(slot)} layer {layer} {which}: {bad.tolist()} differ {context}"
                )


def _kv(which: str) -> Literal["k", "v"]:
    return "k" if which == "k" else "v"


@dataclass
class Sequences:
    """The open sequences of a cache, and a plain record of what each must hold."""

    cache: vattn.KVCache
    writers: dict[int, list[int]] = field(default_factory=dict)
    next_writer: int = 1

    def open(self, slot: int | None = None, expected_tokens: int = 0) -> int:
        index = int(self.cache.open(slot=slot, expected_tokens=expected_tokens))
        self.writers[index] = []
        return index

    def grow(self, slot: int, tokens: int, *, stream: int | None = None) -> None:
        """Ensures and writes up to `tokens` tokens."""
        self.cache.ensure(slot, tokens, stream=stream)
        self.write(slot)

    def write(self, slot: int) -> None:
        """Writes the tokens that the sequence has and the record lacks."""
        held, tokens = self.writers[slot], self.cache.tokens(slot)
        if tokens > len(held):
            write_tokens(self.cache, slot, self.next_writer, len(held), tokens)
            held += [self.next_writer] * (tokens - len(held))
            self.next_writer += 1

    def new(self, tokens: int, slot: int | None = None) -> int:
        index = self.open(slot, expected_tokens=tokens)
        self.grow(index, tokens)
        return index

    def fork(self, slot: int, tokens: int | None = None) -> int:
        child = int(self.cache.fork(slot, tokens))
        self.writers[child] = self.writers[slot][: self.cache.tokens(child)]
        return child

    def truncate(self, slot: int, tokens: int) -> None:
        self.cache.truncate(slot, tokens)
        del self.writers[slot][tokens:]

    def assign(self, destinations: Sequence[int], sources: Sequence[int]) -> None:
        self.cache.assign(destinations, sources)
        was = {slot: list(self.writers[slot]) for slot in sources}
        for to, source in zip(destinations, sources, strict=True):
            self.writers[to] = list(was[source])

    def release(self, slot: int, *, stream: int | None = None) -> None:
        self.cache.release(slot, stream=stream)
        del self.writers[slot]

    def check(self, context: object = "") -> None:
        """The invariants hold and every open sequence has its bytes."""
        self.cache.check()
        for slot, writers in self.writers.items():
            assert_tokens(self.cache, slot, writers, context)

    def end(self) -> None:
        """Releases everything and proves that no memory is left, then closes the cache."""
        for slot in list(self.writers):
            self.release(slot)
        assert_all_given_back(self.cache)
        self.cache.close()


def assert_all_given_back(cache: vattn.KVCache) -> None:
    """With nothing open, a trim leaves no page in existence."""
    cache.check()
    cache.trim()
    cache.check()
    stats = cache.pool.stats()
    assert (stats.created_bytes, stats.stale_bytes) == (0, 0), stats
    assert cache.pool.driver.physical_bytes() == 0


# Addresses and calls ----------------------------------------------------------------------------


def slot_ranges(cache: vattn.KVCache, slot: vattn.Slot | int, tokens: int) -> list[tuple[int, int]]:
    """What a kernel that reads the first `tokens` tokens of a sequence touches: (address, bytes).

    Of window layers, the tokens that are still held.
    """
    space: Any = cache._slots
    ranges = []
    for index, region in enumerate(cache.layout.regions):
        base = space.address(int(slot), index)
        first = space.first_token(int(slot), index)
        for run in range(region.runs):
            start = base + run * region.run_bytes + first * region.token_bytes
            ranges.append((start, (tokens - first) * region.token_bytes))
    return ranges


def launch(fake: FakeCuda, cache: vattn.KVCache, slot: int, tokens: int, stream: int) -> None:
    """A kernel on `stream` that uses the first `tokens` tokens of a sequence."""
    fake.launch(stream, slot_ranges(cache, slot, tokens), f"attention over slot {slot}")


def memory_calls(pool: vattn.PagePool) -> int:
    """Native calls so far that changed mappings or memory."""
    calls = pool.driver_calls()
    return sum(calls[op] for op in MEMORY_OPS)


def pages_of(cache: vattn.KVCache, tokens: Iterable[int]) -> int:
    """Pages that sequences of these lengths need at most: their bytes and one page per run."""
    total = 0
    for n in tokens:
        for region in cache.layout.regions:
            total += region.runs * -(-n * region.token_bytes // cache.pool.page_bytes)
    return total
