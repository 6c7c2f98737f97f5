"""Who gets which slot and which pages: prefix hits, forks, preemption, eviction, budgets.

A finished sequence is *kept*: its slot is free, yet remembers its tokens, and costs nothing that
somebody else could not take. So the prefix cache is the set of kept slots, and there are more slots
than sequences may run at once, since a slot is only a range of addresses. A new sequence that
begins with the tokens of a kept or running slot

* reopens a kept slot in place, where nothing worth keeping lies behind the shared prefix: a
  follow-up turn of a conversation, without any call of the driver; or else
* forks it: full pages are shared, the partial tail is copied.

Eviction is the pool's: it takes pages from the kept slots that were used longest ago, tail first,
whenever somebody needs them, and before anybody is preempted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vattn._core import DriverError, OutOfPages, PagesGone, Ticket
from vattn.engine.gangs import is_lead
from vattn.engine.scheduler import NeverFits
from vattn.engine.speculation.proposer import Proposer
from vattn.kv.cache import KVCache
from vattn.kv.prefix import PrefixIndex, common
from vattn.kv.swap import Saved, SwapSpace
from vattn.outputs import KVUsage
from vattn.request import FinishReason, Request, Status

# Sharing less than this by a fork costs more calls than computing it again.
MIN_FORK_TOKENS = 16
# A request waits for another to compute a prefix that is at least so much longer than what it has.
MIN_WAIT_TOKENS = 64
# Share of the budget that admissions leave to the growth of those that run, as in vLLM.
WATERMARK = 0.01


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


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a sequence's first tokens come from."""

    kind: Literal["fresh", "reopen", "fork"]
    slot: int = -1
    tokens: int = 0


class MemoryManager:
    """The scheduler's view of a KVCache; see :class:`vattn.engine.scheduler.Memory`.

    Args:
        cache: with more slots than sequences run at once if prefixes are to be kept.
        prefix_caching: finished sequences are kept, and new ones share what they can.
        swap: host memory for preempted sequences.
        scratch: set a slot apart, with one token, for the padding rows of captured graphs.

    Attributes:
        proposer: makes drafts, and may have pages beside the sequences; it gives them up before
            anybody is put off or preempted. None for nobody.
    """

    def __init__(
        self, cache: KVCache, *, prefix_caching: bool, swap: SwapSpace, scratch: bool = False
    ) -> None:
        self.cache = cache
        self.prefix_caching = prefix_caching
        self.swap = swap
        self.index = PrefixIndex()
        self.counters = MemoryCounters()
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

    # Admission ------------------------------------------------------------------------------------

    def admit(self, request: Request) -> bool | None:
        """Gives a request a slot with as many of its tokens as can be had, if all of it fits.

        Fits means: the pages for all tokens that it has, and for the next one, can be had beside
        those that running prefills still need.

        Returns:
            Whether it has a slot now; if not, nothing has changed. None if it waits for a prefix
            that somebody is computing: then nobody needs to give way to it.

        Raises:
            NeverFits: the whole budget is too small for it.
        """
        total = min(len(request.tokens) + 1, request.limit)
        best = self._origin(request)
        if self._worth_waiting(request, best.tokens):
            return None
        place = self._place(request, best, total)
        while place is None and self._relieve(request, best, total):
            place = self._place(request, best, total)
        if place is None:
            self._check_ever_fits(request, total)
            return False
        slot, origin = place
        self.index.remove(slot)
        self._owners[slot] = request
        self._fresh.append(request)
        request.slot, request.computed = slot, origin.tokens
        self._restore(request)
        if not request.timings.scheduled_s:
            request.cached = min(request.computed, len(request.prompt_ids))
            self.counters.prefix_queries += len(request.prompt_ids)
            self.counters.prefix_hits += request.cached
        return True

    def _choices(self, request: Request, best: _Origin) -> list[_Origin]:
        """The best place to begin from, and those to take if it needs more pages than there are.

        A fork of a kept slot takes more than that slot has. Going on in its place takes less, and
        beginning anew may take less still: what is kept then gives way to it. A beam takes least
        where its lead is.
        """
        choices = [best]
        if not is_lead(request) and best.slot != request.group.lead.slot:
            score = self._usable(request.group.lead.slot, len(request.prompt_ids))
            if score is not None:
                choices.append(_Origin("fork", request.group.lead.slot, score[0]))
        if best.kind == "fork" and best.slot not in self._owners:
            choices.append(_Origin("reopen", best.slot, best.tokens))
        if best.kind != "fresh" and not self._owners:
            choices.append(_Origin("fresh"))  # nobody runs whose end could be waited for
        return choices

    def _place(self, request: Request, best: _Origin, total: int) -> tuple[int, _Origin] | None:
        """A slot for it, opened, and where its first tokens come from; None if it does not fit."""
        for origin in self._choices(request, best):
            slot = self._try(request, origin, total)
            if slot is not None:
                return slot, origin
        return None

    def _relieve(self, request: Request, best: _Origin, total: int) -> bool:
        """Takes pages from drafts, if the request would fit when they had none."""
        if self.proposer is None:
            return False
        try:
            lacking = self._lacking(request, best, total)
        except PagesGone:
            lacking = self._lacking(request, _Origin("fresh"), total)
        return 0 < lacking <= self.proposer.live_pages() and self.proposer.relieve()

    def _try(self, request: Request, origin: _Origin, total: int) -> int | None:
        """Opens a slot, if all of the request fits then."""
        try:
            return self._open(origin, total) if self._fits(request, origin, total) else None
        except PagesGone:
            self.index.remove(origin.slot)  # somebody has taken its pages since we looked
        except OutOfPages:  # and OutOfSlots
            pass
        except DriverError as error:
            raise _refused(error) from error
        return None

    def _origin(self, request: Request) -> _Origin:
        """The best place to begin from. At least one token is left to compute, for its logits."""
        most = len(request.tokens) - 1
        if request.prompt_logprobs is not None:  # what is not computed has no logits
            most = min(most, len(request.prompt_logprobs) - 1)
        if most <= 0:
            return _Origin("fresh")

        def usable(slot: int, shared: int) -> tuple[int, int] | None:
            return self._usable(slot, min(shared, most))

        found = None
        if self.prefix_caching:
            found = self.index.match(request.tokens, usable, request.cache_salt)
        source = request.source
        if source is not None and source.slot >= 0:
            score = usable(source.slot, len(request.prompt_ids))
            beam = not is_lead(request)  # its pages had better be those of the others
            if score is not None and (
                found is None or score > found[1] or (beam and score[0] >= found[1][0])
            ):
                found = (source.slot, score)
        if found is None:
            return _Origin("fresh")
        slot, (tokens, rank) = found
        return _Origin("reopen" if rank == _IN_PLACE else "fork", slot, tokens)

    def _worth_waiting(self, request: Request, found: int) -> bool:
        """Whether somebody is just computing a much longer prefix of the request than was found.

        Of many prompts that begin alike and come together, one computes the prefix, and the others
        wait for it instead of doing the same.
        """
        if not self.prefix_caching or self._has_windows or request.prompt_logprobs is not None:
            return False
        if not is_lead(request):  # a beam: it has what its lead has
            return False
        for other in self._fresh:
            if other.slot < 0 or other.cache_salt != request.cache_salt:
                continue
            shared = common(other.prompt_ids, request.tokens, 0)
            if shared >= found + MIN_WAIT_TOKENS and other.computed < shared:
                return True
        return False

    def _usable(self, slot: int, shared: int) -> tuple[int, int] | None:
        """How many of the shared tokens a slot can give, and how cheaply."""
        owner = self._owners.get(slot)
        if owner is not None:
            tokens = min(shared, owner.computed)
            lowest = self.cache.lowest(slot) if self._has_windows else 0
            return (tokens, _RUNNING) if tokens >= max(lowest, MIN_FORK_TOKENS) else None
        lowest, kept = self.cache.kept(slot)
        tokens = min(shared, kept)
        if tokens < max(lowest, 1):
            return None
        if self._in_place(kept, tokens):
            return tokens, _IN_PLACE
        return (tokens, _KEPT) if tokens >= MIN_FORK_TOKENS else None

    def _in_place(self, kept: int, tokens: int) -> bool:
        """Whether going back to ``tokens`` gives up no page that is full of what was kept."""
        page = self.cache.pool.page_bytes
        return all(
            kept * region.token_bytes // page == tokens * region.token_bytes // page
            for region in self.cache.layout.regions
        )

    def _fits(self, request: Request, origin: _Origin, total: int) -> bool:
        return self._lacking(request, origin, total) <= 0

    def _lacking(self, request: Request, origin: _Origin, total: int) -> int:
        """Pages that are missing for it; 0 or less if it fits."""
        needed = self.cache.admission_pages(
            total,
            source=None if origin.kind == "fresh" else origin.slot,
            shared_tokens=origin.tokens,
            in_place=origin.kind == "reopen",
            anchor=request.saved.anchor if request.saved is not None else 0,
        )
        available = self.cache.pool.core.available_pages()
        if self._owners:
            prefills = [r for r in self._owners.values() if r.uncomputed > 1]
            if prefills:
                available -= self.cache.pages_needed_many(
                    [r.slot for r in prefills], [min(len(r.tokens) + 1, r.limit) for r in prefills]
                )
            if is_lead(request):
                available -= int(WATERMARK * self._budget_pages())
        return needed - available

    def _budget_pages(self) -> int:
        """Pages that sequences may have in all."""
        stats = self.cache.pool.core.stats()
        fixed = self.scratch_pages + (self.proposer.fixed_pages if self.proposer else 0)
        return max(0, stats["budget_bytes"] // stats["page_bytes"] - fixed)

    def _check_ever_fits(self, request: Request, total: int) -> None:
        needed, budget = self.cache.admission_pages(total), self._budget_pages()
        if needed > budget:
            raise NeverFits(
                f"its {len(request.tokens)} tokens need {needed} pages of "
                f"{self.cache.pool.page_bytes} bytes, and the budget of the KV cache is {budget} "
                "pages; shorten the prompt or raise the budget"
            )

    def _open(self, origin: _Origin, total: int) -> int:
        if origin.kind == "reopen":
            slot = self.cache.reopen(origin.slot, origin.tokens)
            self.counters.reopened += 1
        elif origin.kind == "fork":
            slot = self.cache.fork(origin.slot, origin.tokens)
            self.counters.forked += 1
        else:
            slot = self.cache.open(expected_tokens=total)
        return int(slot)

    # Swapping -------------------------------------------------------------------------------------

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

    # Running --------------------------------------------------------------------------------------

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        """Maps what the step will write: all of it, or nothing and False if pages are short."""
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
            self._tickets.append(
                self.cache.prepare(np.array(slots, np.int32), np.array(tokens, np.int32))
            )

    def _wait_for_tickets(self) -> None:
        """What is mapped in the background would use pages that nobody owns any more."""
        for ticket in self._tickets:
            with contextlib.suppress(OutOfPages, DriverError):  # nobody needs it now
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

    def usage(self, request: Request) -> KVUsage:
        """What a request has of the cache now or, if it has ended, had at its end.

        What was copied into slots that it lost by preemption is part of it.
        """
        before = request.kv or KVUsage()
        if request.slot < 0:
            return before
        now = self.cache.usage(request.slot)
        return replace(now, copied_bytes=now.copied_bytes + before.copied_bytes)

    def release(self, request: Request) -> None:
        """A request has ended: its slot is free, and kept if what it holds is sound."""
        if request.saved is not None:
            self.swap.give_back(request.saved)
            request.saved = None
        if request.slot >= 0:
            self._let_go(request, keep=request.finish_reason is not FinishReason.ERROR)

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

    def _cut(self, request: Request) -> None:
        """Takes back what was mapped for a step that the request is not part of."""
        if self.cache.tokens(request.slot) > request.computed:
            self.cache.truncate(request.slot, request.computed)

    def _let_go(self, request: Request, *, keep: bool) -> None:
        if self.proposer is not None:
            self.proposer.let_go(request)
        slot = request.slot
        # A token that is still in flight could not be found again.
        request.computed = tokens = min(request.computed, len(request.tokens))
        self._cut(request)
        request.kv = self.usage(request)
        if not keep:
            self.cache.mark_dirty(slot)
        keep = keep and self.prefix_caching and tokens > 0
        del self._owners[slot]
        self.index.remove(slot)
        self.cache.release(slot, keep=keep)
        if keep:
            self.index.insert(slot, request.tokens[:tokens], request.cache_salt)
        request.slot, request.computed = -1, 0

    # Budget ---------------------------------------------------------------------------------------

    def over_budget(self) -> bool:
        """Whether running sequences hold more than a lowered budget allows.

        Other users of the pool may be those who hold too much: then it is for them to give way.
        """
        while (stats := self.cache.pool.core.stats())["created_bytes"] > stats["budget_bytes"]:
            if self.proposer is None or not self.proposer.relieve():
                return self._others_bytes() == 0
        return False

    def _others_bytes(self) -> int:
        """What other users of the pool hold of it."""
        own, pool = self.cache.stats(), self.cache.pool.stats()
        ours = own.live_bytes + own.cover_bytes + own.stale_bytes + own.scratch_bytes
        if self.proposer is not None:
            ours += self.proposer.held_bytes()
        return max(0, pool.used_bytes - ours)

    def shortage(self, request: Request) -> str | None:
        """Why a request that is alone cannot go on; None if others hold what it lacks."""
        if self._trouble is not None:
            return f"the driver failed: {self._trouble}"
        total = min(len(request.tokens) + 1, request.limit)
        needed, whose, remedy = self.cache.admission_pages(total), "its", "lower max_tokens"
        if request.group is not None and request.group.started:
            needed += self._beam_pages(request, total)
            whose = f"{request.group.width} beams of"
            remedy = "lower beam_width or max_tokens"
        if needed <= self._budget_pages() and self._others_bytes() > 0:
            return None
        return (
            f"out of pages: {whose} {len(request.tokens)} tokens need {needed} pages of "
            f"{self.cache.pool.page_bytes} bytes, and the budget of the KV cache is "
            f"{self._budget_pages()} pages; raise the budget, or {remedy}"
        )

    def _beam_pages(self, lead: Request, total: int) -> int:
        """What the other beams of a group need beside those of its lead, which has a slot."""
        score = self._usable(lead.slot, len(lead.prompt_ids))
        each = self.cache.admission_pages(
            total,
            source=None if score is None else lead.slot,
            shared_tokens=0 if score is None else score[0],
        )
        return int(lead.group.width - 1) * each

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the budget while running; kept prefixes go first, then requests are preempted."""
        self.cache.pool.set_budget(budget_bytes)

    def lose_all(self) -> None:
        """Gives back every slot and keeps nothing, whatever state an interruption has left."""
        self.index = PrefixIndex()
        self._owners, self._fresh, self._trouble = {}, [], None
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
        open_slots = self.cache.stats().open_slots
        scratch = self.scratch_slot is not None
        assert open_slots == len(self._owners) + scratch, (open_slots, self._owners)
        assert self.scratch_slot not in self._owners, self.scratch_slot
        for slot, request in self._owners.items():
            assert request.slot == slot, request
            assert request.computed <= self.cache.tokens(slot) or request.computed == 0, request


# How cheaply a prefix can be had, as the second part of a score.
_KEPT, _RUNNING, _IN_PLACE = 0, 1, 2


def _is_fatal(error: Exception) -> bool:
    return isinstance(error, DriverError) and error.fatal


def _refused(error: DriverError) -> Exception:
    """What a failure of the driver at admission is: of the request, unless nothing works any more.

    A request that was only put off would be tried again for ever if the failure stays.
    """
    return error if error.fatal else NeverFits(f"the driver failed: {error}")
