"""Who gets which slot and which pages: prefix hits, forks, preemption, eviction, budgets.

A finished sequence is *kept*: its slot is free, yet remembers its tokens, and costs nothing that
somebody else could not take. So the prefix cache is the set of kept slots, and there are more slots
than sequences may run at once, since a slot is only a range of addresses. A new sequence that
begins with the tokens of a kept or running slot

* reopens a kept slot in place, where nothing worth keeping lies behind the shared prefix: a
  follow-up turn of a conversation, without any call of the driver; or else
* forks it: full pages are shared, the partial tail is copied.

Eviction is the pool's: it takes pages from the kept slots that were used longest ago, tail first,
whenever somebody needs them, and before anybody is preempted. A policy may say who comes first
instead, and what is kept at all; see :mod:`.eviction`.
"""

from __future__ import annotations

import contextlib

import numpy as np

from vattn._core import DriverError, OutOfPages
from vattn.engine.admission import Admission
from vattn.engine.holdings import MemoryCounters
from vattn.kv.prefix import PrefixIndex
from vattn.kv.swap import SwapSpace
from vattn.outputs import KVUsage
from vattn.request import FinishReason, Request, Status

__all__ = ["MemoryCounters", "MemoryManager"]


class MemoryManager(Admission):
    """The scheduler's view of a KVCache; see :class:`vattn.engine.scheduler.Memory`.

    Its arguments are those of :class:`.holdings.Holdings`.
    """

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        """Maps what the step will write: all of it, or nothing and False if pages are short."""
        if self.evictor is not None:
            self.evictor.before_growth(slots, tokens)
        try:
            while not self._ensure(slots, tokens):
                if self.proposer is None or not self.proposer.relieve():
                    self._trouble = None
                    return False
        except DriverError as error:
            if error.fatal:
                raise
            self._trouble = error  # undone; with fewer sequences it may do, and if not, one is left
            return False
        self._trouble = None
        return True

    def _ensure(self, slots: list[int], tokens: list[int]) -> bool:
        try:
            self.cache.ensure_many(np.array(slots, np.int32), np.array(tokens, np.int32))
        except OutOfPages:
            return False
        return True

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        """Makes each slot what its source was; nothing and False if pages are short."""
        try:
            while not self._assign(slots, sources):
                if self.proposer is None or not self.proposer.relieve():
                    return False
        except DriverError as error:
            if error.fatal:
                raise
            return False  # undone; who cannot be moved is computed again elsewhere
        self.counters.beams_moved += len(slots)
        return True

    def _assign(self, slots: list[int], sources: list[int]) -> bool:
        try:
            self.cache.assign(np.array(slots, np.int32), np.array(sources, np.int32))
        except OutOfPages:
            return False
        return True

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        """Maps what the next step will write, in the background."""
        self._drop_tickets()
        if slots:
            if self.evictor is not None:
                self.evictor.before_growth(slots, tokens)
            self._tickets.append(
                self.cache.prepare(np.array(slots, np.int32), np.array(tokens, np.int32))
            )

    def _wait_for_tickets(self) -> None:
        """What is mapped in the background would use pages that nobody owns any more."""
        for ticket in self._tickets:
            # Nobody needs it now, and its slots may have been released.
            with contextlib.suppress(OutOfPages, DriverError, ValueError):
                ticket.wait()
        self._tickets = []

    def _drop_tickets(self) -> None:
        """Lets go of finished work. What it could not do, :meth:`grow` does or reports."""
        while self._tickets and self._tickets[0].done():
            self._tickets.pop(0)

    def last_prompt_tokens(self, decodes: list[Request]) -> int:
        """How many of the decodes of a step compute the last token of a prompt."""
        if not self._fresh:
            return 0
        return sum(r.computed == len(r.prompt_ids) for r in decodes)

    def index_prompts(self) -> None:
        """After a launch: others may share what it has computed of prompts."""
        if not self._fresh:
            return
        pending = []
        for request in self._fresh:
            if self._owners.get(request.slot) is not request:
                continue
            if request.computed < len(request.prompt_ids):
                pending.append(request)
            if self.prefix_caching:
                # A beam's slot may hold what another one goes on with, after the prompt.
                known = request.tokens if request.group is None else request.prompt_ids
                tokens = known[: request.computed]
                self.index.insert(request.slot, tokens, request.cache_salt)
        self._fresh = pending

    def release(self, request: Request) -> None:
        """A request has ended: its slot is free, and kept if what it holds is sound."""
        if request.saved is not None:
            self.swap.give_back(request.saved)
            request.saved = None
        if request.slot < 0:
            return
        sound = request.finish_reason is not FinishReason.ERROR
        keep = False
        try:
            keep = sound and self._is_worth_keeping(request)
        finally:
            self._let_go(request, keep=keep, sound=sound)

    def _is_worth_keeping(self, request: Request) -> bool:
        return self.evictor is None or not request.computed or self.evictor.keeps(request)

    def preempt(self, request: Request) -> None:
        """A request gives way: it begins again later, from what is then left of it.

        Beams are not swapped out, since they would come back without the pages that they share.
        """
        swaps = request.saved is None and request.group is None
        if swaps and request.status is Status.RUNNING:
            self._cut(request)
            self._save(request)
        self._let_go(request, keep=True)
        assert request.kv is not None, request
        request.kv = KVUsage(copied_bytes=request.kv.copied_bytes)  # all that it still has

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        """See :class:`vattn.engine.policy.Memory`."""
        if spoiled:  # kernels read whole tiles, and multiply by zero what they mask
            known, length = request.computed, self.cache.tokens(request.slot)
            for layer in range(len(self.cache.specs)):
                for tensor in self.cache.layer(layer):
                    tensor[request.slot, known:length] = 0
        self._cut(request)

    def _let_go(self, request: Request, *, keep: bool, sound: bool = True) -> None:
        if self.proposer is not None:
            self.proposer.let_go(request)
        slot = request.slot
        # A token that is still in flight could not be found again.
        request.computed = tokens = min(request.computed, len(request.tokens))
        self._cut(request)
        request.kv = self.usage(request)
        # That what it has computed are numbers is known since the first token that was sampled from
        # it. Before, whoever begins alike may have it, since it would compute the same.
        if not (sound and len(request.tokens) > len(request.prompt_ids)):
            self.cache.mark_dirty(slot)
        keep = keep and self.prefix_caching and tokens > 0
        del self._owners[slot]
        self.index.remove(slot)
        self.cache.release(slot, keep=keep)
        if keep:
            self.index.insert(slot, request.tokens[:tokens], request.cache_salt)
        if self.evictor is not None:
            self.evictor.closed(slot, request, tokens if keep else 0)
        request.slot, request.computed = -1, 0

    def lose_all(self) -> None:
        """Gives back every slot and keeps nothing, whatever state an interruption has left."""
        self.index = PrefixIndex()
        self._owners, self._fresh, self._trouble = {}, [], None
        if self.evictor is not None:
            self.evictor.forget()
        self.swap = SwapSpace(self.swap.capacity_bytes, pinned=self.swap.pinned)
        for slot in range(self.cache.max_seqs):
            if self.cache.is_open(slot) and slot != self.scratch_slot:
                with contextlib.suppress(DriverError):  # the others are given back all the same
                    self.cache.mark_dirty(slot)
                    self.cache.release(slot)
        if self.proposer is not None:
            self.proposer.lose_all()
        self.cache.trim()

    def close(self) -> None:
        """Ends the use of the scratch slot; steps that were launched may still write to it."""
        self._wait_for_tickets()
        if self.proposer is not None:
            self.proposer.close()
            self.proposer = None
        if self.scratch_slot is not None and self.cache.is_open(self.scratch_slot):
            self.cache.release(self.scratch_slot)
        self.scratch_slot, self.scratch_pages = None, 0

    def reset_prefix_cache(self) -> None:
        """Forgets every kept sequence; running ones go on."""
        for slot in range(self.cache.max_seqs):
            if slot not in self._owners and slot in self.index:  # never the scratch slot
                self.index.remove(slot)
                self.cache.forget(slot)
                if self.evictor is not None:
                    self.evictor.forget(slot)

    def check(self) -> None:
        """Verifies that owners, slots, index and memory agree.

        Raises:
            AssertionError: they do not, which is a bug of vattn.
        """
        self.cache.check()
        self.index.check()
        self.swap.check()
        if self.proposer is not None:
            self.proposer.check()
        if self.evictor is not None:
            self.evictor.check(self._owners)
        open_slots = self.cache.stats().open_slots
        scratch = self.scratch_slot is not None
        assert open_slots == len(self._owners) + scratch, (open_slots, self._owners)
        assert self.scratch_slot not in self._owners, self.scratch_slot
        for slot, request in self._owners.items():
            assert request.slot == slot, request
            assert request.computed <= self.cache.tokens(slot) or request.computed == 0, request
