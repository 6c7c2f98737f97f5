"""Sequences that are released with `keep`, and a record of what each slot must remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.helpers import Sequences, as_bytes, make_cache, make_pool, pages_of, token_bytes
from vattn import OutOfPages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import vattn
    from vattn import _core
    from vattn.kv.layout import Order


@dataclass
class KeptSequences(Sequences):
    """As :class:`Sequences`, with kept slots.

    `kept` has the writers of what each slot had when it was released; it may have lost its end.
    """

    kept: dict[int, list[int]] = field(default_factory=dict)

    def keep(self, slot: int, *, stream: int | None = None) -> None:
        self.cache.release(slot, keep=True, stream=stream)
        self.kept[slot] = self.writers.pop(slot)

    def opened(self, slot: vattn.Slot, writers: Sequence[int]) -> int:
        """A sequence that begins with what somebody else wrote."""
        self.kept.pop(int(slot), None)
        self.writers[int(slot)] = list(writers)
        return int(slot)

    def open(self, slot: int | None = None, expected_tokens: int = 0) -> int:
        index = super().open(slot, expected_tokens)
        self.kept.pop(index, None)
        return index

    def reopen(self, slot: int, tokens: int) -> int:
        return self.opened(self.cache.reopen(slot, tokens), self.kept[slot][:tokens])

    def fork(self, slot: int, tokens: int | None = None, *, stream: int | None = None) -> int:
        writers = self.writers[slot] if slot in self.writers else self.kept[slot]
        child = self.cache.fork(slot, tokens, stream=stream)
        return self.opened(child, writers[: self.cache.tokens(child)])

    def lengths(self) -> dict[int, int]:
        """How many tokens each slot keeps now, without those that keep none."""
        return {slot: n for slot, (_, n) in enumerate(self.cache.kept_lengths().tolist()) if n}

    def check(self, context: object = "") -> None:
        """Also: what slots keep is what they had, where they had it."""
        super().check(context)
        lengths = self.lengths()
        assert lengths.keys() <= self.kept.keys(), context
        for slot, tokens in lengths.items():
            writers = self.kept[slot]
            assert 0 < tokens <= len(writers), context
            assert_kept(self.cache, slot, writers[:tokens], context)


def assert_kept(
    cache: vattn.KVCache, slot: int, writers: Sequence[int], context: object = ""
) -> None:
    """A free slot still has the bytes of these writers that its next user can reach."""
    lowest, _ = cache.kept(slot)
    for layer, spec in enumerate(cache.specs):
        start = 0 if spec.window is None else max(0, lowest - spec.window)
        for part, tensor in enumerate(cache.layer(layer)):
            seen = as_bytes(tensor[slot, start : len(writers)]).flatten(1).cpu().numpy()
            wanted = token_bytes(writers[start:], start, seen.shape[1], layer, "v" if part else "k")
            bad = start + np.flatnonzero((seen != wanted).any(axis=1))
            assert len(bad) == 0, f"kept slot {slot} layer {layer} part {part}: {bad} {context}"


def short_pool(driver: _core.Driver, tokens: list[int], order: Order) -> KeptSequences:
    """A cache with as many pages as sequences of these lengths need, and slots to spare."""
    probe = make_cache(make_pool(driver), order=order)
    pages = pages_of(probe, tokens)
    probe.close()
    return KeptSequences(make_cache(make_pool(driver, pages=pages), order=order, max_seqs=8))


def fill_up(seqs: KeptSequences, slot: int, check: Callable[[], None]) -> None:
    """Grows a sequence by a token at a time until it is full or nothing is left for it."""
    for tokens in range(1, seqs.cache.max_tokens + 1):
        try:
            seqs.grow(slot, tokens)
        except OutOfPages:
            return
        check()


def held_pages(cache: vattn.KVCache, tokens: int) -> int:
    """Pages with at least one of so many tokens, without their cover."""
    page = cache.pool.page_bytes
    return sum(r.runs * -(-tokens * r.token_bytes // page) for r in cache.layout.regions)
