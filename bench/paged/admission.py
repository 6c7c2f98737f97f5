"""Who is let in, and which blocks it finds: the rules of :mod:`vattn.engine.admission` on blocks.

Who waits for whom, what admissions leave to those that run, and what never fits are decided as on
the contiguous side, so that two runs differ in memory and not in policy. What differs by nature:
prefixes are found in whole blocks, wherever these are, and never copied; only samples and beams,
which begin at the same moment, copy the block in which their prompt ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.paged.cache import PagedCache
from bench.paged.prefix import Chain
from vattn.engine.admission import MIN_FORK_TOKENS, WATERMARK, is_computed_now
from vattn.engine.gangs import is_lead
from vattn.engine.holdings import MemoryCounters
from vattn.engine.policy import NeverFits
from vattn.engine.speculation.proposer import Proposer
from vattn.request import Request

_LEAST_KNOWN = 32  # records that are kept before any is looked at again


@dataclass(frozen=True, slots=True)
class _Hit:
    """What a request finds: full blocks to share, and one to copy if ``tokens`` ends in it.

    ``named`` of the blocks were found by their names.
    """

    blocks: list[int] = field(default_factory=list)
    tokens: int = 0
    tail: int | None = None
    named: int = 0


@dataclass(slots=True)
class Held:
    """A request that has a slot.

    Args:
        request: whose slot it is.
        chain: names of its blocks.
        named: how many of its blocks have theirs in the pool.
        found: blocks that it did not write itself since it was admitted, at its beginning.
        foreign: the same, since it was admitted for the first time.
        copied_bytes: into the slot since it was opened.
    """

    request: Request
    chain: Chain
    named: int
    found: int
    foreign: int
    copied_bytes: int = 0


@dataclass(slots=True)
class _Known:
    """What is remembered of a request while it waits, from its first time on."""

    request: Request
    chain: Chain
    foreign: int | None = None  # see Held


class PagedAdmission:
    """Admits requests; what :class:`.memory.PagedMemory` builds on.

    Args:
        cache: with a slot for each sequence that may run, and for those that end with tokens in
            flight.
        prefix_caching: new sequences share what blocks still contain.
        scratch: the last slot is set apart for the padding rows of captured graphs, which write to
            the null block.

    Attributes:
        proposer: makes drafts; None for nobody. It has no blocks.
    """

    def __init__(
        self, cache: PagedCache, *, prefix_caching: bool = True, scratch: bool = False
    ) -> None:
        self.cache = cache
        self.prefix_caching = prefix_caching
        self.counters = MemoryCounters()
        self.proposer: Proposer | None = None
        self.scratch_slot: int | None = None
        if scratch:
            # Its row of the tables stays zero, which is the null block.
            self.scratch_slot = cache.open(cache.max_seqs - 1)
        self._begin()

    def _begin(self) -> None:
        self._held: dict[int, Held] = {}  # by slot
        self._fresh: list[Request] = []  # whose prompts are not computed yet
        self._known: dict[str, _Known] = {}  # by id, of those that have not ended; see _remember
        self._most_known = _LEAST_KNOWN

    def admit(self, request: Request) -> bool | None:
        """Gives a request a slot with as many of its tokens as can be had, if all of it fits.

        See :meth:`vattn.engine.policy.Memory.admit`.
        """
        total = min(len(request.tokens) + 1, request.limit)
        known = self._remember(request)
        chain = known.chain
        hit = self._find(request, chain)
        if self._worth_waiting(request, hit.tokens):
            return None
        full = self.cache.open_slots == self.cache.max_seqs
        if full or self._lacking(request, hit, total) > 0:
            self._check_ever_fits(request, total)
            return False
        slot = self.cache.open()
        self._begin_at(slot, hit)
        if request.group is not None:  # its tokens after the prompt may become another beam's
            known.chain = chain.first(len(request.prompt_ids) // self.cache.block_tokens)
            chain = chain.first(hit.named)
        found = len(hit.blocks)
        known.foreign = found if known.foreign is None else min(found, known.foreign)
        held = Held(request, chain, named=hit.named, found=found, foreign=known.foreign)
        if hit.tail is not None:
            held.copied_bytes = self.cache.block_bytes
            self.counters.forked += 1
        self._held[slot] = held
        self._fresh.append(request)
        request.slot, request.computed = slot, hit.tokens
        if not request.timings.scheduled_s:
            request.cached = min(request.computed, len(request.prompt_ids))
            if is_lead(request):  # other beams take their lead's, with a prefix cache or without
                self.counters.prefix_queries += len(request.prompt_ids)
                self.counters.prefix_hits += request.cached
        return True

    def _begin_at(self, slot: int, hit: _Hit) -> None:
        self.cache.blocks.share(hit.blocks)
        blocks = hit.blocks
        if hit.tail is not None:
            own = self.cache.blocks.take(1)
            self.cache.copy_blocks([hit.tail], own)
            blocks = blocks + own
        self.cache.hold(slot, blocks, hit.tokens)

    def _remember(self, request: Request) -> _Known:
        """Its record: names are not made again while it waits, nor after a preemption.

        Who ends without a slot is not told of, so those who have are dropped as records add up.
        """
        known = self._known.get(request.id)
        if known is None or known.request is not request:
            if len(self._known) >= self._most_known:
                self._known = {k: v for k, v in self._known.items() if not v.request.finished}
                self._most_known = max(_LEAST_KNOWN, 2 * len(self._known))
            known = _Known(request, Chain(request.cache_salt, self.cache.block_tokens))
            self._known[request.id] = known
        return known

    # What it finds --------------------------------------------------------------------------------

    def _find(self, request: Request, chain: Chain) -> _Hit:
        """The longest beginning there is. At least one token is left to compute, for its logits."""
        most = _most(request)
        if most <= 0:
            return _Hit()
        hit = self._match(request, chain, most) if self.prefix_caching else _Hit()
        source = request.source
        if source is None or source.slot < 0:
            return hit
        tokens = min(source.computed, len(request.prompt_ids), most)
        if tokens >= max(MIN_FORK_TOKENS, hit.tokens):
            return self._fork(source.slot, tokens)
        return hit

    def _match(self, request: Request, chain: Chain, most: int) -> _Hit:
        """Full blocks that contain its first tokens."""
        blocks: list[int] = []
        for index in range(most // self.cache.block_tokens):
            block = self.cache.blocks.find(chain.name(request.tokens, index))
            if block is None:
                break
            blocks.append(block)
        return _Hit(blocks, len(blocks) * self.cache.block_tokens, named=len(blocks))

    def _fork(self, slot: int, tokens: int) -> _Hit:
        """The first tokens of a slot: its full blocks, and a copy of the one they end in."""
        blocks, full = self.cache.blocks_of(slot), tokens // self.cache.block_tokens
        ends_within = tokens % self.cache.block_tokens > 0
        return _Hit(blocks[:full], tokens, blocks[full] if ends_within else None)

    def _worth_waiting(self, request: Request, found: int) -> bool:
        """Whether somebody is just computing a much longer prefix of the request than was found."""
        if not self.prefix_caching or request.prompt_logprobs is not None or not is_lead(request):
            return False
        unit = self.cache.block_tokens
        return is_computed_now(request, self._fresh, found, most=_most(request), unit=unit)

    # Whether it fits ------------------------------------------------------------------------------

    def _lacking(self, request: Request, hit: _Hit, total: int) -> int:
        """Blocks that are missing for it; 0 or less if it fits."""
        blocks = self.cache.blocks
        shared = sum(blocks.holders(block) > 0 for block in hit.blocks)
        needed = self.cache.blocks_for(total) - shared  # free ones that it shares are used up, too
        available = blocks.free
        if self._held:
            prefills = [h.request for h in self._held.values() if h.request.uncomputed > 1]
            available -= self.cache.needed(
                [r.slot for r in prefills], [min(len(r.tokens) + 1, r.limit) for r in prefills]
            )
            if is_lead(request):
                available -= int(WATERMARK * blocks.limit)
        return needed - available

    def _check_ever_fits(self, request: Request, total: int) -> None:
        needed, budget = self.cache.blocks_for(total), self.cache.blocks.limit
        if needed > budget:
            raise NeverFits(
                f"its {len(request.tokens)} tokens need {needed} blocks of "
                f"{self.cache.block_tokens} tokens, and the budget of the KV cache is {budget} "
                "blocks; shorten the prompt or raise the budget"
            )

    def shortage(self, request: Request) -> str:
        """Why a request that is alone cannot go on: nobody else has blocks of this cache."""
        total = min(len(request.tokens) + 1, request.limit)
        needed, whose, remedy = self.cache.blocks_for(total), "its", "lower max_tokens"
        group = request.group
        if group is not None and group.started:
            shared = min(request.computed, len(request.prompt_ids)) // self.cache.block_tokens
            needed += (group.width - 1) * (needed - shared)
            whose, remedy = f"{group.width} beams of", "lower beam_width or max_tokens"
        return (
            f"out of blocks: {whose} {len(request.tokens)} tokens need {needed} blocks of "
            f"{self.cache.block_tokens} tokens, and the budget of the KV cache is "
            f"{self.cache.blocks.limit} blocks; raise the budget, or {remedy}"
        )


def _most(request: Request) -> int:
    """How many of its tokens need not be computed."""
    most = len(request.tokens) - 1
    if request.prompt_logprobs is not None:  # what is not computed has no logits
        most = min(most, len(request.prompt_logprobs) - 1)
    return most
