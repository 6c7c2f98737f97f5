"""What the memory manager is made of: cache, prefix index, host memory, budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vattn._core import DriverError, OutOfPages, Ticket
from vattn.config import parse_bytes
from vattn.engine.eviction import EvictionPolicy, Evictor
from vattn.engine.speculation.proposer import Proposer
from vattn.kv.cache import KVCache
from vattn.kv.prefix import PrefixIndex
from vattn.kv.swap import Saved, SwapSpace
from vattn.outputs import KVUsage
from vattn.request import Request


@dataclass(slots=True)
class MemoryCounters:
    """What the memory manager has done so far. Hits and queries are counted in tokens."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    reopened: int = 0
    forked: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    beams_moved: int = 0


class Holdings:
    """Who has which slot, and what of the budget; what :class:`.admission.Admission` builds on.

    Args:
        cache: with more slots than sequences run at once if prefixes are to be kept.
        prefix_caching: finished sequences are kept, and new ones share what they can.
        swap: host memory for preempted sequences.
        scratch: set a slot apart, with one token, for the padding rows of captured graphs.
        eviction: what is kept, and what of it goes first; None for all, and used longest ago.

    Attributes:
        proposer: makes drafts, and may have pages beside the sequences; it gives them up before
            anybody is put off or preempted. None for nobody.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        prefix_caching: bool,
        swap: SwapSpace,
        scratch: bool = False,
        eviction: EvictionPolicy | None = None,
    ) -> None:
        self.cache = cache
        self.prefix_caching = prefix_caching
        self.swap = swap
        self.index = PrefixIndex()
        self.counters = MemoryCounters()
        self.evictor = None if eviction is None else Evictor(eviction, cache)
        self.proposer: Proposer | None = None
        self._owners: dict[int, Request] = {}
        self._has_windows = any(spec.window for spec in cache.specs)
        self._fresh: list[Request] = []  # whose prompts are not computed yet
        self._tickets: list[Ticket] = []
        self._trouble: DriverError | None = None  # why the latest grow() failed, if not for pages
        self.scratch_slot: int | None = None
        self.scratch_pages = 0
        if scratch:
            # Captured graphs know its address: it stays as it is for as long as the cache lives.
            self.scratch_slot = cache.max_seqs - 1
            self.scratch_pages = cache.admission_pages(1)
            cache.open(slot=self.scratch_slot)
            cache.ensure(self.scratch_slot, 1)

    def ask_no_more(self) -> None:
        """Nothing will be kept from now on, so no policy is asked any more."""
        self.evictor = None

    # Host memory ----------------------------------------------------------------------------------

    @property
    def swap_used_bytes(self) -> int:
        """Host memory of those that were swapped out."""
        return self.swap.used_bytes

    def _restore(self, request: Request) -> None:
        """Brings back what was swapped out, beyond what the slot holds already.

        If that goes wrong, the rest is computed again.
        """
        saved: Saved | None = request.saved
        if saved is None:
            return
        request.saved = None
        try:
            if saved.tokens > request.computed:
                self.cache.restore(
                    request.slot, saved.tokens, saved.anchor, saved.buffer, request.computed
                )
                request.computed = saved.tokens
                self.counters.swapped_in += 1
        except (OutOfPages, DriverError) as error:
            if _is_fatal(error):
                raise
            self._cut(request)
        finally:
            self.swap.give_back(saved)

    def _save(self, request: Request) -> None:
        """Copies what a preempted sequence has computed to host memory, if it has room.

        If that goes wrong, it is computed again.
        """
        n = self.cache.saved_bytes(request.slot) if self.swap.capacity_bytes else 0
        if not self.swap.room_for(n):
            return
        try:
            saved = self.swap.take(n, request.computed, self.cache.anchor(request.slot))
        except RuntimeError:
            return  # the system has no more memory that it could lock
        try:
            self.cache.save(request.slot, saved.buffer)
        except BaseException as error:
            self.swap.give_back(saved)
            if not isinstance(error, (OutOfPages, DriverError)) or _is_fatal(error):
                raise
            return
        request.saved = saved
        self.counters.swapped_out += 1

    def _cut(self, request: Request) -> None:
        """Takes back what was mapped for a step that the request is not part of."""
        if self.cache.tokens(request.slot) > request.computed:
            self.cache.truncate(request.slot, request.computed)

    def usage(self, request: Request) -> KVUsage:
        """What a request has of the cache now or, if it has ended, had at its end.

        What was copied into slots that it lost by preemption is part of it.
        """
        before = request.kv or KVUsage()
        if request.slot < 0:
            return before
        now = self.cache.usage(request.slot)
        return replace(now, copied_bytes=now.copied_bytes + before.copied_bytes)

    # Budget ---------------------------------------------------------------------------------------

    def over_budget(self) -> bool:
        """Whether running sequences hold more than a lowered budget allows.

        Other users of the pool may be those who hold too much: then it is for them to give way.
        """
        while (stats := self.cache.pool.core.stats())["created_bytes"] > stats["budget_bytes"]:
            if self.proposer is None or not self.proposer.relieve():
                return self._others_bytes() == 0
        return False

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the budget while running; kept prefixes go first, then requests are preempted.

        Raises:
            PolicyError: an eviction policy failed; the budget is as before.
        """
        budget = parse_bytes(budget_bytes, "budget_bytes")
        if self.evictor is not None:
            self.evictor.before_budget(budget)
        self.cache.pool.set_budget(budget)

    def _budget_pages(self) -> int:
        """Pages that sequences may have in all."""
        stats = self.cache.pool.core.stats()
        fixed = self.scratch_pages + (self.proposer.fixed_pages if self.proposer else 0)
        return max(0, stats["budget_bytes"] // stats["page_bytes"] - fixed)

    def _others_bytes(self) -> int:
        """What other users of the pool hold of it."""
        own, pool = self.cache.stats(), self.cache.pool.stats()
        ours = own.live_bytes + own.cover_bytes + own.stale_bytes + own.scratch_bytes
        if self.proposer is not None:
            ours += self.proposer.held_bytes()
        return max(0, pool.used_bytes - ours)


def _is_fatal(error: Exception) -> bool:
    """Whether nothing works any more, on the driver's word."""
    return isinstance(error, DriverError) and error.fatal
