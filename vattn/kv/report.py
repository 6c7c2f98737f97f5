"""What a cache tells about itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class PageState(enum.IntEnum):
    """What a page of a slot is, for memory maps."""

    UNMAPPED = 0
    LIVE = 1
    SHARED = 2
    COVER = 3
    STALE = 4
    KEPT = 5


@dataclass(frozen=True)
class CacheStats:
    """Figures of a cache. Bytes are of distinct physical pages, each under the first that fits.

    ``live``: at least one token of an open sequence is in it. ``cover``: mapped beyond the last
    token, for kernels that read whole tiles or for growth that was prepared. ``stale``: still
    mapped in a slot that does not use it; of it ``kept``: with content that a free slot remembers.
    ``pooled``: free in the pool, which caches may share. ``shared``: of ``live``, with tokens of
    two or more open sequences now.
    ``token_bytes``: K and V of all live tokens; with shared prefixes it can exceed ``live_bytes``.
    ``copied_bytes``: since the start, by forks, reorders (what they stage included), writes to
    shared pages, and sequences that went to host memory and came back.
    """

    open_slots: int
    kept_slots: int
    tokens: int
    token_bytes: int
    live_bytes: int
    shared_bytes: int
    cover_bytes: int
    stale_bytes: int
    kept_bytes: int
    scratch_bytes: int
    pooled_bytes: int
    reserved_bytes: int
    budget_bytes: int
    page_bytes: int
    pages_mapped: int
    pages_adopted: int
    pages_aliased: int
    pages_recycled: int
    pages_reclaimed: int
    copied_bytes: int
    evicted_tokens: int
    driver_calls: dict[str, int]


@dataclass(frozen=True)
class SlotMap:
    """Pages of one slot: per region an array ``[runs, pages_per_run]`` of :class:`PageState`.

    ``tokens`` is the length of an open sequence, ``kept`` what a free slot remembers. ``recycled``
    has the same shapes as ``regions``: pages in use that were mapped already when they came into
    use, because a sequence before had them, and that went over in place, without a call of the
    driver. Empty if it is not known.
    """

    index: int
    open: bool
    tokens: int
    regions: tuple[npt.NDArray[np.uint8], ...]
    kept: int = 0
    recycled: tuple[npt.NDArray[np.bool_], ...] = ()


@dataclass(frozen=True)
class MemoryMap:
    """The virtual address space of a cache as it is at one moment."""

    page_bytes: int
    slots: tuple[SlotMap, ...]
