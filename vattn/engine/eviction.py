"""What is kept of finished requests, and what of it goes first: a policy of one's own.

A policy decides *who*; *how* stays with the cache: pages are taken from the end of a sequence, and
those that several sequences keep go last. Without a policy nothing of this is asked or counted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vattn.request import Request, Status

if TYPE_CHECKING:
    from vattn.kv.cache import KVCache


class PolicyError(RuntimeError):
    """A policy failed, or returned what it must not; the message names it and what it did."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptSequence:
    """What a request has left that ended, or gave way.

    It tells of this moment, and is made anew for each call.

    Args:
        slot: where it is. Others may have it later.
        id: its own from the first time it is kept until it is gone, and nobody else's before or
            after. A request that goes on in its place goes on with its ``id`` and ``uses``; one
            that forks it has its own.
        tokens: how many of its tokens are still there; the end may be gone.
        last_used_s: when it was kept, or a request last continued from it; of ``time.monotonic``,
            and never the same for two.
        uses: requests that have continued from it so far.
        cache_salt: of its requests.
        waiting: its request was preempted and comes back for it. What of it goes is computed again.
    """

    slot: int
    id: int
    tokens: int
    last_used_s: float
    uses: int
    cache_salt: str
    waiting: bool
    _ids: tuple[int, ...] = field(repr=False)
    _count_pages: Callable[[], int] = field(repr=False)

    @property
    def token_ids(self) -> Sequence[int]:
        """Of the tokens that are still there, prompt first. Not copied unless the end is gone."""
        return self._ids if self.tokens == len(self._ids) else self._ids[: self.tokens]

    @property
    def pages(self) -> int:
        """Pages that only it holds, and that come free when it goes. Counted when asked for."""
        return self._count_pages()


class EvictionPolicy:
    """What the engine does without one: everything is kept, and what was used longest ago goes.

    Make a class from it that says otherwise, and pass an object of it as
    ``LLM(..., eviction_policy=...)``. Its methods are called between steps, on the engine's thread;
    an exception ends all requests with a :class:`PolicyError`, and the engine begins anew. It is
    not asked about requests that end because the engine is closed.
    """

    def keep(self, request: Request) -> bool:
        """Whether what a request has computed is kept, now that it has ended.

        Asked of each of a prompt's ``n`` samples, and of each beam of a beam search.

        Args:
            request: with its ``prompt_ids``, ``tokens`` (prompt and output), ``cached`` (tokens of
                the prompt that it found), ``cache_salt`` and ``finish_reason``.
        """
        return True

    def victims(self, kept: Sequence[KeptSequence], pages: int) -> Iterable[KeptSequence]:
        """Who goes first, when a request that begins or grows would have something evicted.

        Sequences are shortened in this order until there are pages enough, and after them those
        that were not named, used longest ago first. So naming more of them than have to go costs
        nothing: ``sorted(kept, key=...)`` is a policy. An order holds until the next is given.

        More than ``pages`` goes in one case: a request that begins with nothing of anybody's, and
        would have to take half of the first one's pages or more, takes its slot, and all of it.

        Args:
            kept: all of them, in no order, but for the one that the request continues from. Those
                of preempted requests are among them, see :attr:`KeptSequence.waiting`.
            pages: that have to come from them; 0 if only a slot is short.
        """
        return ()


@dataclass(slots=True)
class _Record:
    """Of one slot, open or kept."""

    id: int
    ids: tuple[int, ...] | None = None  # None while it is open
    preempted: Request | None = None  # which may have come back since, elsewhere
    salt: str = ""
    uses: int = 0
    last_used_s: float = 0.0


class Evictor:
    """Asks a policy on behalf of the memory manager, and counts what it is told of.

    Args:
        policy: the user's.
        cache: whose kept slots it decides over.
        clock: seconds, as of ``time.monotonic``.
    """

    def __init__(
        self, policy: EvictionPolicy, cache: KVCache, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._cache = cache
        self._clock = clock
        self._records: dict[int, _Record] = {}
        self._serial = itertools.count()
        self._last_s = -math.inf

    def keeps(self, request: Request) -> bool:
        """What the policy says about keeping a request.

        Raises:
            PolicyError: it failed, or did not say.
        """
        try:
            keep = self._policy.keep(request)
        except Exception as error:
            raise self._failed("keep", error) from error
        if not isinstance(keep, bool | np.bool_):
            raise self._wrong(f"keep() returned {keep!r}; return True or False")
        return bool(keep)

    def opened(self, slot: int, source: int, *, in_place: bool, counts: bool) -> None:
        """A request got a slot, with the first tokens of a source, or of -1 for nobody.

        Args:
            slot: now open.
            source: open or kept; ``slot`` itself if ``in_place``.
            in_place: it was reopened.
            counts: that is a use of the source, and not the return of who was preempted.
        """
        if source >= 0:
            of = self._records[source]
            of.uses += counts
            of.last_used_s = self._now()
        if not in_place:
            self._records[slot] = _Record(next(self._serial))
        self._records[slot].ids = None

    def closed(self, slot: int, request: Request, tokens: int) -> None:
        """A slot is free, and keeps so many tokens of a request that ended or gives way."""
        if not tokens:
            self._records.pop(slot, None)
            return
        record = self._records[slot]
        record.ids, record.salt = tuple(request.tokens[:tokens]), request.cache_salt
        record.preempted = None if request.finished else request
        record.last_used_s = self._now()

    def _now(self) -> float:
        """Later than before, however coarse the clock is: the order of uses does not hang on it."""
        self._last_s = max(self._clock(), math.nextafter(self._last_s, math.inf))
        return self._last_s

    def forget(self, slot: int | None = None) -> None:
        """What a slot kept is gone; None for all slots, open ones included."""
        if slot is None:
            self._records = {}
        else:
            self._records.pop(slot, None)

    def before_growth(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Asks who goes first, if growing open slots to these lengths would evict somebody.

        Raises:
            PolicyError: see :meth:`ask`.
        """
        if not slots:
            return
        needed = self._cache.pages_needed_many(slots, tokens)
        if (pages := needed - self._cache.pool.core.unkept_pages()) > 0:
            self.ask(pages)

    def before_opening(self, pages: int, source: int, open_slots: int | None) -> None:
        """The same for a request that is about to get a slot.

        Args:
            pages: that it needs beside those of its source.
            source: the slot that has its first tokens, or -1.
            open_slots: how many are; None if it goes on in its source's.

        Raises:
            PolicyError: see :meth:`ask`.
        """
        pages -= self._cache.pool.core.unkept_pages()
        if pages > 0 or (open_slots is not None and not self._has_vacant_slot(open_slots)):
            self.ask(max(0, pages), source)

    def before_budget(self, budget_bytes: int) -> None:
        """The same for a budget that is about to be lowered.

        Raises:
            PolicyError: see :meth:`ask`.
        """
        core = self._cache.pool.core
        stats = core.stats()
        lost = (stats["budget_bytes"] - budget_bytes) // stats["page_bytes"]
        unkept = core.unkept_pages()
        pages = min(lost, core.available_pages()) - unkept
        if pages > 0:
            self.ask(pages)

    def _has_vacant_slot(self, open_slots: int) -> bool:
        """Whether a free slot keeps nothing."""
        kept = int(np.count_nonzero(self._cache.kept_lengths()[:, 1]))
        return open_slots + kept < self._cache.max_seqs

    def ask(self, pages: int, source: int = -1) -> None:
        """Has the cache evict in the policy's order from now on.

        Args:
            pages: that are short.
            source: whose content is about to be used, and not to be decided about.

        Raises:
            PolicyError: the policy failed, or named what it was not given; the order is as before.
        """
        kept = self._kept(source)
        if not kept:
            return
        given = {each.slot: each for each in kept}
        named: list[int] = []
        try:
            victims: Iterable[object] = self._policy.victims(kept, pages)
            for each in victims:
                if not isinstance(each, KeptSequence) or given.pop(each.slot, None) is not each:
                    what = f"slot {each.slot}" if isinstance(each, KeptSequence) else repr(each)
                    raise self._wrong(
                        f"victims() named {what}, which is none of the {len(kept)} sequences that "
                        "it was given just now, or was named before; name each of them once at most"
                    )
                named.append(each.slot)
        except PolicyError:
            raise
        except Exception as error:
            raise self._failed("victims", error) from error
        self._cache.evict_first(named)

    def _kept(self, source: int) -> list[KeptSequence]:
        lengths = self._cache.kept_lengths()[:, 1].tolist()
        kept = []
        for slot, record in list(self._records.items()):
            if record.ids is None or slot == source:
                continue
            if not lengths[slot]:  # evicted since
                del self._records[slot]
                continue
            kept.append(
                KeptSequence(
                    slot,
                    record.id,
                    lengths[slot],
                    record.last_used_s,
                    record.uses,
                    record.salt,
                    _is_waiting(record.preempted),
                    record.ids,
                    partial(self._cache.sole_pages, slot),
                )
            )
        return kept

    def _failed(self, method: str, error: Exception) -> PolicyError:
        return self._wrong(f"{method}() failed: {type(error).__name__}: {error}")

    def _wrong(self, what: str) -> PolicyError:
        return PolicyError(f"eviction_policy={type(self._policy).__qualname__}: {what}")

    def check(self, open_slots: Iterable[int]) -> None:
        """Verifies that every open slot is known, and known as open.

        Raises:
            AssertionError: it is not, which is a bug of vattn.
        """
        known = {slot for slot, record in self._records.items() if record.ids is None}
        assert known == set(open_slots), (known, open_slots)


def _is_waiting(request: Request | None) -> bool:
    """Whether a request that was preempted has still not come back."""
    return request is not None and request.status is Status.WAITING and request.slot < 0
