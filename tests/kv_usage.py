"""A plain record of what each sequence shares, and of what was copied into it."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from vattn.kv.report import PageState
from vattn.outputs import KVUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    import vattn

    Tails: TypeAlias = list[tuple[int, npt.NDArray[np.uint32]]]  # bytes and pages, by region

WITH_TOKENS = (PageState.LIVE, PageState.SHARED)
IN_USE = (*WITH_TOKENS, PageState.COVER)


def pages_in(cache: vattn.KVCache, slot: int, states: Iterable[PageState]) -> list[int]:
    """The pages of a slot that are in one of these states, over all its regions."""
    space = cache._slots
    found: list[int] = []
    for region in range(len(cache.layout.regions)):
        ids, seen = space.page_ids(slot, region), space.page_states(slot, region)
        found += ids[np.isin(seen, [int(state) for state in states])].tolist()
    return found


def tail_bytes(cache: vattn.KVCache, tokens: int) -> int:
    """Bytes of the partly filled pages at the end of a sequence, one per run at most."""
    page = cache.pool.page_bytes
    return sum(r.runs * (tokens * r.token_bytes % page) for r in cache.layout.regions)


def tails(cache: vattn.KVCache, slot: int, tokens: int) -> Tails:
    """Of each region: bytes of a run's partly filled page, and which page that is in each run."""
    page, out = cache.pool.page_bytes, []
    for index, region in enumerate(cache.layout.regions):
        at, used = divmod(tokens * region.token_bytes, page)
        ids = cache._slots.page_ids(slot, index)
        out.append((used, ids[:, at] if used else ids[:0, 0]))
    return out


@dataclass
class UsageRecord:
    """What :meth:`KVCache.usage` must say of each open sequence.

    `shared` are the pages that had two users at once, until none of their users has a token in
    them; `copied` counts bytes.
    """

    cache: vattn.KVCache
    shared: set[int] = field(default_factory=set)
    copied: Counter[int] = field(default_factory=Counter)

    def opened(self, slot: int) -> None:
        """A sequence that copied nothing yet."""
        self.copied[slot] = 0

    def forked(self, slot: int) -> None:
        self.copied[slot] = tail_bytes(self.cache, self.cache.tokens(slot))

    def assigned(self, pairs: Iterable[tuple[int, int]]) -> None:
        """After a reorder of ``(destination, source)`` slots."""
        for to, source in pairs:
            if to == source:
                continue
            tokens = self.cache.tokens(to)
            self.copied[to] += tail_bytes(self.cache, tokens)
            for _, pages in tails(self.cache, to, tokens):  # written anew, maybe in place
                self.shared.difference_update(pages.tolist())

    @contextmanager
    def growing(self, slots: Sequence[int], tokens: int | None = None) -> Iterator[None]:
        """Around what writes from the end of sequences on, or from token `tokens`.

        A partly filled page that is another one afterwards was copied.
        """
        lengths = [self.cache.tokens(slot) if tokens is None else tokens for slot in slots]
        before = [tails(self.cache, slot, n) for slot, n in zip(slots, lengths, strict=True)]
        try:
            yield
        finally:
            for slot, length, was in zip(slots, lengths, before, strict=True):
                now = tails(self.cache, slot, length)
                for (used, old), (_, new) in zip(was, now, strict=True):
                    self.copied[slot] += used * int((old != new).sum())

    def observe(self, slots: Iterable[int]) -> None:
        """After each operation, with the open slots."""
        users: Counter[int] = Counter()
        with_tokens: set[int] = set()
        for slot in slots:
            pages = pages_in(self.cache, slot, IN_USE)
            assert len(set(pages)) == len(pages), f"slot {slot} has a page twice"
            users.update(pages)
            with_tokens.update(pages_in(self.cache, slot, WITH_TOKENS))
        self.shared &= with_tokens
        self.shared |= {page for page, n in users.items() if n > 1}

    def check(self, slots: Iterable[int]) -> None:
        """The cache says the same."""
        slots = list(slots)
        self.observe(slots)
        seen = self.cache.usage_many(slots)
        for slot, usage in zip(slots, seen, strict=True):
            pages = pages_in(self.cache, slot, WITH_TOKENS)
            known = len(self.shared.intersection(pages))
            assert usage == KVUsage(len(pages), known, self.copied[slot]), slot
            assert usage == self.cache.usage(slot)
        every = {page for slot in slots for page in pages_in(self.cache, slot, WITH_TOKENS)}
        stats = self.cache.stats()
        assert stats.live_bytes == len(every) * self.cache.pool.page_bytes
        assert sum(usage.copied_bytes for usage in seen) <= stats.copied_bytes
