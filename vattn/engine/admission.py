"""Who is let in, and where its first tokens come from: prefix hits, forks, slots to reopen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vattn._core import DriverError, OutOfPages, PagesGone
from vattn.engine.eviction import Evictor
from vattn.engine.gangs import is_lead
from vattn.engine.holdings import Holdings
from vattn.engine.policy import NeverFits
from vattn.kv.prefix import common
from vattn.request import OUT_OF_PAGES, Request

# Sharing less than this by a fork costs more calls than computing it again.
MIN_FORK_TOKENS = 16
# A request waits for another to compute a prefix that is at least so much longer than what it has.
MIN_WAIT_TOKENS = 64
# Share of the budget that admissions leave to the growth of those that run, as in vLLM.
WATERMARK = 0.01


# How cheaply a prefix can be had, as the second part of a score.
_KEPT, _RUNNING, _IN_PLACE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a sequence's first tokens come from."""

    kind: Literal["fresh", "reopen", "fork"]
    slot: int = -1
    tokens: int = 0


class Admission(Holdings):
    """Admits requests; what :class:`.memory.MemoryManager` builds on."""

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
        if self.evictor is not None:
            self.evictor.opened(
                slot,
                origin.slot,
                in_place=origin.kind == "reopen",
                counts=not request.timings.scheduled_s,
            )
        self.index.remove(slot)
        self._owners[slot] = request
        self._fresh.append(request)
        request.slot, request.computed = slot, origin.tokens
        self._restore(request)
        if not request.timings.scheduled_s:
            request.cached = min(request.computed, len(request.prompt_ids))
            if is_lead(request):  # other beams take their lead's, with a prefix cache or without
                self.counters.prefix_queries += len(request.prompt_ids)
                self.counters.prefix_hits += request.cached
        return True

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
            if not self._fits(request, origin, total):
                return None
            if self.evictor is not None:
                self._ask_evictor(self.evictor, request, origin, total)
            return self._open(origin, total)
        except PagesGone:
            self.index.remove(origin.slot)  # somebody has taken its pages since we looked
        except OutOfPages:  # and OutOfSlots
            pass
        except DriverError as error:
            raise _refused(error) from error
        return None

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

    def _ask_evictor(self, evictor: Evictor, request: Request, origin: _Origin, total: int) -> None:
        in_place = origin.kind == "reopen"
        open_slots = len(self._owners) + (self.scratch_slot is not None)
        needed = self._pages(request, origin, total, new_only=True)
        evictor.before_opening(needed, origin.slot, None if in_place else open_slots)

    def _fits(self, request: Request, origin: _Origin, total: int) -> bool:
        return self._lacking(request, origin, total) <= 0

    def _pages(
        self, request: Request, origin: _Origin, total: int, *, new_only: bool = False
    ) -> int:
        return self.cache.admission_pages(
            total,
            source=None if origin.kind == "fresh" else origin.slot,
            shared_tokens=origin.tokens,
            in_place=origin.kind == "reopen",
            anchor=request.saved.anchor if request.saved is not None else 0,
            new_only=new_only,
        )

    def _lacking(self, request: Request, origin: _Origin, total: int) -> int:
        """Pages that are missing for it; 0 or less if it fits."""
        needed = self._pages(request, origin, total)
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

    def _check_ever_fits(self, request: Request, total: int) -> None:
        needed, budget = self.cache.admission_pages(total), self._budget_pages()
        if needed > budget:
            raise NeverFits(
                f"{OUT_OF_PAGES}: its {len(request.tokens)} tokens need {needed} pages of "
                f"{self.cache.pool.page_bytes} bytes, and the budget of the KV cache is {budget} "
                "pages; shorten the prompt or raise the budget"
            )

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
            f"{OUT_OF_PAGES}: {whose} {len(request.tokens)} tokens need {needed} pages of "
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

    # Where a sequence begins ----------------------------------------------------------------------

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
        return is_computed_now(request, self._fresh, found)

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


def is_computed_now(
    request: Request,
    others: Iterable[Request],
    found: int,
    *,
    most: int | None = None,
    unit: int = 1,
) -> bool:
    """Whether somebody is just computing a much longer prefix of a request than was found.

    Args:
        request: that is to be admitted.
        others: whose prompts are not computed yet, as far as is known; some may have ended.
        found: tokens that the request could have without waiting.
        most: tokens that it could have if it waited; None for all of its own.
        unit: tokens that can be had at once: prefixes are of a multiple of it.
    """
    for other in others:
        if other.slot < 0 or other.cache_salt != request.cache_salt:
            continue
        shared = common(other.prompt_ids, request.tokens, 0)
        if most is not None:
            shared = min(shared, most)
        shared -= shared % unit
        if shared >= found + MIN_WAIT_TOKENS and other.computed < shared:
            return True
    return False


def _refused(error: DriverError) -> Exception:
    """What a failure of the driver at admission is: of the request, unless nothing works any more.

    A request that was only put off would be tried again for ever if the failure stays.
    """
    return error if error.fatal else NeverFits(f"the driver failed: {error}")
