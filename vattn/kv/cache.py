"""A KV cache whose sequences are contiguous in virtual memory and grow by mapping pages."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from vattn import _core
from vattn.config import positive_int
from vattn.kv.arrays import as_int32, as_integer
from vattn.kv.defaults import default_page_bytes, layout_default
from vattn.kv.kept import KeptSlots
from vattn.kv.layout import LayerSpec, Layout, Order, make_layout
from vattn.kv.pool import (
    PagePool,
    default_budget_bytes,
    open_driver,
    parse_device,
    shared_pool,
)
from vattn.kv.report import CacheStats, MemoryMap, SlotMap
from vattn.kv.slots import LengthList, Slot, SlotLike, SlotList, token_count
from vattn.outputs import KVUsage

# Tiles of the FlashAttention kernels in use on a GPU, by head size and dtype. SDPA on a CPU reads
# exactly what it is given.
DEFAULT_TILES: dict[str, tuple[int, ...]] = {"cpu": (1,), "cuda": (128, 176, 192, 224)}


class KVCache(KeptSlots):
    """Virtual K and V tensors for up to ``max_seqs`` sequences of up to ``max_tokens`` tokens.

    All addresses are reserved at once and never move; physical pages are mapped where tokens are.

    Args:
        layers: number of equal layers, or one :class:`LayerSpec` per layer.
        kv_heads, head_dim, dtype, window: of equal layers; not with a list of specs.
        max_seqs: slots.
        max_tokens: longest sequence.
        device: ``"cpu"`` (default) or ``"cuda[:n]"``.
        pool: a pool to share; else PyTorch's under :func:`vattn.allocator.enable`; else one is made
            from ``page_bytes``, ``budget_bytes`` (default: as the pool's, but no more than the full
            cache) and ``strict``, which can be given for no other pool.
        layers_per_region, order: see :mod:`vattn.kv.layout`; None for the device's default.
        kv_tile_tokens: tile sizes in tokens of the kernels that read the cache; reads are covered
            up to whole tiles. None for the device's default.
        reuse_stale: a released slot keeps its pages mapped for its next user. Off only to compare.

    Raises:
        ValueError: a size that is not positive, off the granularity or beyond what kernels address.
    """

    def __init__(
        self,
        layers: int | Sequence[LayerSpec],
        kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_seqs: int,
        max_tokens: int,
        device: str | torch.device | None = None,
        window: int | None = None,
        page_bytes: int | None = None,
        budget_bytes: int | str | None = None,
        pool: PagePool | None = None,
        layers_per_region: int | None = None,
        order: Order | None = None,
        kv_tile_tokens: int | Sequence[int] | None = None,
        reuse_stale: bool = True,
        strict: bool = False,
    ) -> None:
        self.specs = _layer_specs(layers, kv_heads, head_dim, dtype, window)
        if pool is not None:
            _check_pool(pool, device, page_bytes, budget_bytes, strict)
        self.device = pool.device if pool is not None else parse_device(device or "cpu")
        if pool is None:
            own = {"budget_bytes": budget_bytes, "page_bytes": page_bytes, "strict": strict}
            pool = shared_pool(self.device, **own)
        driver = pool.driver if pool is not None else open_driver(self.device, strict=strict)
        defaults = layout_default(self.device)
        if kv_tile_tokens is None:
            kv_tile_tokens = DEFAULT_TILES[self.device.type]
        tiles = kv_tile_tokens if isinstance(kv_tile_tokens, Sequence) else (kv_tile_tokens,)
        self.layout: Layout = make_layout(
            self.specs,
            slots=max_seqs,
            max_tokens=max_tokens,
            page_bytes=(
                pool.page_bytes
                if pool is not None
                else _page_bytes(self.device, driver, page_bytes)
            ),
            order=defaults.order if order is None else order,
            layers_per_region=(
                defaults.layers_per_region if layers_per_region is None else layers_per_region
            ),
            tiles=tiles,
        )
        if pool is None:
            if budget_bytes is None:
                default = default_budget_bytes(self.device.type, driver)
                budget_bytes = min(self.layout.most_bytes, default)
            pool = PagePool(
                self.device,
                page_bytes=self.layout.page_bytes,
                budget_bytes=budget_bytes,
                driver=driver,
            )
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self._space: _core.SlotSpace | None = _core.SlotSpace(
            pool.core,
            regions=[region.core_spec() for region in self.layout.regions],
            slots=max_seqs,
            max_tokens=max_tokens,
            tiles=tiles,
            keep_stale=reuse_stale,
        )
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # Lifetime -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives every page back to the pool; tensors handed out keep addresses, not memory."""
        self._tensors.clear()
        self._space = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Sequences ------------------------------------------------------------------------------------

    def open(self, *, slot: int | None = None, expected_tokens: int = 0) -> Slot:
        """Takes a free slot for a new, empty sequence. No driver call.

        What a kept slot holds is lost when it is taken. That happens when no other is free, and
        when so many tokens cannot be had without taking kept pages from somebody: those of the slot
        used longest ago are then used where they are, if at least half of them are needed.

        Args:
            slot: a particular one; None takes the one whose leftover pages fit best.
            expected_tokens: how long the sequence is likely to get, 0 for unknown.

        Raises:
            OutOfSlots: all slots are open.
            ValueError: the slot asked for is open or does not exist.
        """
        if expected_tokens < 0:
            raise ValueError(f"expected_tokens={expected_tokens} must not be negative")
        if slot is not None and not 0 <= slot < self.max_seqs:
            raise ValueError(f"slot={slot} is not one of the {self.max_seqs} slots of this cache")
        return self._handle(self._slots.open(slot, expected_tokens))

    def release(self, slot: SlotLike, *, keep: bool = False, stream: int | None = None) -> None:
        """Ends a sequence. Its pages stay mapped for the next user until somebody needs them.

        Args:
            slot: is free from now on.
            keep: it remembers its tokens for :meth:`reopen` and :meth:`fork`; see :meth:`kept`.
            stream: raw CUDA stream of its last kernels; None for torch's current one.

        Raises:
            ValueError: it is not open, or ``keep`` in a cache with ``reuse_stale=False``.
        """
        self._slots.release(self._index(slot), self._stream(stream), keep)

    def ensure(self, slot: SlotLike, tokens: int, *, stream: int | None = None) -> None:
        """Makes the first ``tokens`` tokens mapped and the sequence at least that long.

        The tokens from the present length on may then be written, and whole tiles up to the last
        one read. Each call that lengthens a sequence begins a step: its first query is the present
        length, and sliding-window layers give up what lies before the window of that query. Call
        it once per step, after the kernels of the step before were launched.

        Raises:
            OutOfPages: the budget is exhausted; nothing has changed.
            ValueError: more than ``max_tokens``, or a sequence that is not open.
        """
        self._slots.ensure(self._index(slot), tokens, self._stream(stream))

    def ensure_many(
        self,
        slots: SlotList,
        tokens: LengthList,
        *,
        stream: int | None = None,
    ) -> None:
        """:meth:`ensure` for many sequences in one call: all of them or none.

        Args:
            slots: int32 ``[n]`` slot indices (NumPy or CPU tensor), or handles.
            tokens: int32 ``[n]`` lengths.
            stream: raw CUDA stream that the kernels will run on; None for torch's current one.
        """
        self._slots.ensure_many(self._slot_array(slots), as_int32(tokens), self._stream(stream))

    def prepare(
        self,
        slots: SlotList,
        tokens: LengthList,
        *,
        stream: int | None = None,
    ) -> _core.Ticket:
        """Maps what a later :meth:`ensure_many` will need, in the background.

        Returns:
            A ticket; ``wait()`` returns when it is done, and raises what went wrong. Lengths do not
            change.
        """
        return self._slots.prepare_async(
            self.pool.mapper, self._slot_array(slots), as_int32(tokens), self._stream(stream)
        )

    def truncate(self, slot: SlotLike, tokens: int, *, stream: int | None = None) -> None:
        """Shortens a sequence to its first ``tokens`` tokens.

        Raises:
            ValueError: longer than it is, or further back than a sliding-window layer holds.
        """
        self._slots.truncate(self._index(slot), token_count(tokens), self._stream(stream))

    def fork(self, slot: SlotLike, tokens: int | None = None, *, stream: int | None = None) -> Slot:
        """A new sequence with the first ``tokens`` tokens (all by default) of ``slot``.

        Full pages are shared and never written again; the partial tail of each run is copied. The
        slot may be a kept one, and stays so: it becomes the one used last.

        Raises:
            OutOfSlots, OutOfPages: nothing has changed, but for what other slots kept.
            PagesGone: a kept slot no longer has them; nothing has changed.
            ValueError: more tokens than the sequence has.
        """
        index = self._index(slot)
        if tokens is None:
            tokens = self._slots.kept(index)[1] or self._slots.tokens(index)
        return self._handle(self._slots.fork(index, token_count(tokens), self._stream(stream)))

    def assign(
        self,
        destinations: SlotList,
        sources: SlotList,
        *,
        stream: int | None = None,
    ) -> None:
        """Makes each destination what its source was before the call: a reorder of beams.

        Full pages that differ are shared by remapping, partial tails are copied. All slots must
        be open.
        """
        self._slots.assign(
            self._slot_array(destinations), self._slot_array(sources), self._stream(stream)
        )

    def trim(self) -> int:
        """Unmaps stale pages and gives all free memory back to the device; returns those bytes.

        Pages of kept slots are stale, too: afterwards nothing is kept.
        """
        return self._slots.trim()

    def mark_dirty(self, slot: SlotLike) -> None:
        """Declares that a sequence may hold NaN or infinity: its pages are zeroed before reuse."""
        self._slots.mark_dirty(self._index(slot))

    # Tensors --------------------------------------------------------------------------------------

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer over all slots, ``[slots, slot_tokens, kv_heads, head_dim]`` each.

        For kernels only: most of it is reserved and not mapped, and touching that on a GPU ends the
        context. For eyes and arithmetic use :meth:`view`.
        """
        self._check_layer(layer)
        if layer not in self._tensors:
            space = self._slots
            self._tensors[layer] = (
                self.layout.tensor(space, layer, "k"),
                self.layout.tensor(space, layer, "v"),
            )
        return self._tensors[layer]

    def flat(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as ``[slots * slot_tokens, kv_heads, head_dim]``.

        Slot ``s`` starts at token ``s * slot_tokens``.
        For kernels only, as :meth:`layer`.

        Raises:
            ValueError: the cache is in head order.
        """
        self._check_layer(layer)
        space = self._slots
        return (
            self.layout.tensor(space, layer, "k", flat=True),
            self.layout.tensor(space, layer, "v", flat=True),
        )

    def view(self, slot: SlotLike, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one sequence, ``[n, kv_heads, head_dim]`` each, bounded to what is mapped.

        They are tokens ``first_token(slot, layer)`` up to the sequence's length.
        """
        index = self._index(slot)
        first, last = self.first_token(slot, layer), self._slots.tokens(index)
        k, v = self.layer(layer)
        return k[index, first:last], v[index, first:last]

    def first_token(self, slot: SlotLike, layer: int) -> int:
        """First token of a sequence that a layer still holds: 0 unless it has a window."""
        self._check_layer(layer)
        index = self._index(slot)
        first = self._slots.first_token(index, self.layout.places[layer][0])
        return min(first, self._slots.tokens(index))

    @property
    def holes_readable(self) -> bool:
        """Whether all of every slot may be read: what is not mapped there reads as zeros."""
        return self.pool.driver.holes_are_zero()

    def slot_tokens(self, layer: int) -> int:
        """Tokens from one slot to the next in a layer's flat view."""
        self._check_layer(layer)
        return self.layout.regions[self.layout.places[layer][0]].slot_tokens

    # Reports --------------------------------------------------------------------------------------

    def tokens(self, slot: SlotLike) -> int:
        """Length of a sequence."""
        return self._slots.tokens(self._index(slot))

    def is_open(self, slot: int) -> bool:
        """Whether a slot, by its index, has a sequence."""
        return self._slots.is_open(slot)

    def pages_needed(self, slot: SlotLike, tokens: int) -> int:
        """Pages that ``ensure(slot, tokens)`` would have to find; see :meth:`pages_needed_many`."""
        return self._slots.pages_needed(self._index(slot), tokens)

    def usage(self, slot: SlotLike) -> KVUsage:
        """What an open sequence has of the cache, shared and copied pages among it.

        Raises:
            ValueError: it is not open.
        """
        return self.usage_many([slot])[0]

    def usage_many(self, slots: SlotList) -> list[KVUsage]:
        """:meth:`usage` of many sequences at one moment, in their order."""
        return [KVUsage(*row) for row in self._slots.usage(self._slot_array(slots)).tolist()]

    def stats(self) -> CacheStats:
        """Figures of this moment."""
        space, pool = self._slots.stats(), self.pool.stats()
        return CacheStats(
            **space,
            pooled_bytes=pool.free_bytes,
            budget_bytes=pool.budget_bytes,
            page_bytes=pool.page_bytes,
            driver_calls=self.pool.driver_calls(),
        )

    def memory_map(self) -> MemoryMap:
        """State of every page of every slot."""
        space = self._slots
        slots = []
        for index in range(self.max_seqs):
            is_open = space.is_open(index)
            tokens = space.tokens(index) if is_open else 0
            pages = tuple(
                space.page_states(index, region) for region in range(len(self.layout.regions))
            )
            recycled = tuple(
                space.recycled(index, region) for region in range(len(self.layout.regions))
            )
            slots.append(SlotMap(index, is_open, tokens, pages, space.kept(index)[1], recycled))
        return MemoryMap(self.pool.page_bytes, tuple(slots))

    def overview(self, cells: int) -> list[tuple[int, int, int, bytes]]:
        """The slots with anything mapped, each as index, tokens, tokens kept, and cells.

        The stretch of a slot is spread over the cells. Of the pages of a cell, over all regions and
        runs, it has the :class:`PageState` that most needs to be seen: shared, live, cover, kept,
        stale, in this order; 0x80 is added if one of the pages is recycled, see :class:`SlotMap`.

        Args:
            cells: for each slot.
        """
        if not 0 < as_integer(cells) < 2**31:
            raise ValueError(f"cells={cells} must be positive")
        return self._slots.overview(int(cells))

    def check(self) -> None:
        """Verifies the invariants of the cache and its pool.

        Raises:
            InvariantError: one is broken, which is a bug of vattn.
        """
        self._slots.check()

    # Arguments ------------------------------------------------------------------------------------

    def _check_layer(self, layer: int) -> None:
        as_integer(layer)
        if not 0 <= layer < len(self.specs):
            raise ValueError(f"layer {layer} is not one of the {len(self.specs)} layers")


def _check_pool(
    pool: PagePool,
    device: str | torch.device | None,
    page_bytes: int | None,
    budget_bytes: int | str | None,
    strict: bool,
) -> None:
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool={pool!r} is not a vattn.PagePool")
    if (page_bytes, budget_bytes, strict) != (None, None, False):
        raise ValueError("page_bytes, budget_bytes and strict belong to the pool given")
    if device is not None and parse_device(device) != pool.device:
        raise ValueError(f"device={str(device)!r}, but the pool given is on {pool.device}")


def _page_bytes(device: torch.device, driver: _core.Driver, page_bytes: int | None) -> int:
    if page_bytes is None:
        return default_page_bytes(device, driver)
    if positive_int(page_bytes, "page_bytes") % driver.granularity():
        raise ValueError(
            f"page_bytes={page_bytes} is not a multiple of the granularity of {driver.name()}, "
            f"which is {driver.granularity()} bytes"
        )
    return page_bytes


def _layer_specs(
    layers: int | Sequence[LayerSpec],
    kv_heads: int | None,
    head_dim: int | None,
    dtype: torch.dtype | None,
    window: int | None,
) -> tuple[LayerSpec, ...]:
    if not isinstance(layers, Sequence):
        layers = positive_int(layers, "layers")
        if kv_heads is None or head_dim is None or dtype is None:
            raise ValueError("give kv_heads, head_dim and dtype, or a list of LayerSpec")
        return (LayerSpec(kv_heads, head_dim, dtype, window),) * layers
    if (kv_heads, head_dim, dtype, window) != (None, None, None, None):
        raise ValueError("kv_heads, head_dim, dtype and window are part of each LayerSpec given")
    return tuple(layers)
