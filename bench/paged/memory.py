"""The baseline's memory manager: blocks for the engine's scheduler, as vLLM V1 manages them.

What it takes from there: blocks are allocated when a step needs them; a full block is found by the
digest of all tokens up to its end from the moment on that the step which writes it was launched;
who gives way is computed again, from what is then left of its blocks; memory is allocated once and
never given back. Nothing is done ahead of a step, since there is nothing to map.

Blocks are written, copied and zeroed in the order of torch's current stream, and so are the tables:
a block may go to another sequence while a step that was launched still uses it.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from bench.paged.admission import Held, PagedAdmission
from bench.paged.blocks import OutOfBlocks
from bench.paged.cache import PagedCache
from bench.paged.prefix import Chain
from vattn.config import format_bytes, parse_bytes
from vattn.outputs import KVUsage
from vattn.request import FinishReason, Request


class PagedMemory(PagedAdmission):
    """The scheduler's view of a PagedCache; see :class:`vattn.engine.storage.EngineMemory`.

    Args:
        cache: see :class:`.admission.PagedAdmission`.
        prefix_caching: see there.
        scratch: see there.
        budget_bytes: what the cache was made for, if it needs less than that; None for its size.
    """

    swap_used_bytes = 0  # who gives way is computed again

    def __init__(
        self,
        cache: PagedCache,
        *,
        prefix_caching: bool = True,
        scratch: bool = False,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(cache, prefix_caching=prefix_caching, scratch=scratch)
        size = cache.num_blocks * cache.block_bytes
        self._most_bytes = max(size, budget_bytes or 0)

    # Steps ----------------------------------------------------------------------------------------

    def grow(self, slots: list[int], tokens: list[int]) -> bool:
        """Gives the step blocks for what it will write: all of it, or nothing and False."""
        try:
            grown = self.cache.ensure(slots, tokens)
        except OutOfBlocks:
            return False
        if self.prefix_caching:
            for slot in grown:  # what is before a new block is full
                held = self._held[slot]
                if held.request.group is None:
                    self._name(held, held.request.computed)
        return True

    def prepare(self, slots: list[int], tokens: list[int]) -> None:
        """Nothing: a block that is free can be written at once."""

    def last_prompt_tokens(self, decodes: list[Request]) -> int:
        """How many of the decodes of a step compute the last token of a prompt."""
        if not self._fresh:
            return 0
        return sum(r.computed == len(r.prompt_ids) for r in decodes)

    def index_prompts(self) -> None:
        """After a launch: others may share what it has computed of prompts."""
        pending = []
        for request in self._fresh:
            held = self._held.get(request.slot)
            if held is None or held.request is not request:
                continue
            if request.computed < len(request.prompt_ids):
                pending.append(request)
            if self.prefix_caching:
                end = request.computed
                if request.group is not None:  # its slot may go on as another beam's
                    end = min(end, len(request.prompt_ids))
                self._name(held, end)
        self._fresh = pending

    def _name(self, held: Held, computed: int) -> None:
        """Has the full blocks among the first ``computed`` tokens found from now on.

        A token that is in flight has no place in a name yet, and what was computed from tainted
        blocks gets none.
        """
        request = held.request
        full = min(computed, len(request.tokens)) // self.cache.block_tokens
        if held.named >= full or self._is_tainted(request.slot):
            return
        row = self.cache.tables.host[request.slot]
        for index in range(held.named, full):
            self.cache.blocks.name(int(row[index]), held.chain.name(request.tokens, index))
        held.named = full

    def cut(self, request: Request, *, spoiled: bool = False) -> None:
        """See :class:`vattn.engine.policy.Memory`."""
        length = self.cache.tokens(request.slot)
        if spoiled:  # kernels multiply by zero what they mask
            self.cache.zero_tokens(request.slot, request.computed, length)
        if length > request.computed:
            self.cache.truncate(request.slot, request.computed)

    def reorder(self, slots: list[int], sources: list[int]) -> bool:
        """Makes each slot what its source was; nothing and False if blocks are short.

        Full blocks are shared, and the ones in which sequences end are copied, in one go.
        """
        try:
            origins, targets = self.cache.assign(slots, sources)
        except OutOfBlocks:
            return False
        self.cache.copy_blocks(origins, targets)
        before = {source: replace(self._held[source]) for source in sources}
        for slot, source in zip(slots, sources, strict=True):
            if slot != source:
                held, was = self._held[slot], before[source]
                held.chain, held.named = was.chain.first(was.named), was.named
                held.found, held.foreign = was.found, was.foreign
                if self.cache.tokens(slot) % self.cache.block_tokens:
                    held.copied_bytes += self.cache.block_bytes
        self.counters.beams_moved += len(slots)
        return True

    # Ends -----------------------------------------------------------------------------------------

    def preempt(self, request: Request) -> None:
        """A request gives way: it begins again later, from what is then left of its blocks."""
        self._let_go(request, keep=True)
        assert request.kv is not None, request
        request.kv = KVUsage(copied_bytes=request.kv.copied_bytes)  # all that it still has

    def release(self, request: Request) -> None:
        """A request has ended: its blocks are free, and found again if what they hold is sound."""
        self._known.pop(request.id, None)
        if request.slot >= 0:
            # That what it has computed are numbers is known since its first token.
            sound = request.finish_reason is not FinishReason.ERROR and bool(request.output_ids)
            self._let_go(request, keep=sound)

    def _let_go(self, request: Request, *, keep: bool) -> None:
        if self.proposer is not None:
            self.proposer.let_go(request)
        slot = request.slot
        keep = keep and not self._is_tainted(slot)
        if not keep:
            self._spoil(slot)
        # A token that is still in flight could not be found again.
        request.computed = min(request.computed, len(request.tokens))
        self.cut(request)
        request.kv = self.usage(request)
        held = self._held.pop(slot)
        if keep and self.prefix_caching:
            self._name(held, request.computed)
        self.cache.release(slot)
        request.slot, request.computed = -1, 0

    def _spoil(self, slot: int) -> None:
        """What a request has written is not to be trusted: nobody finds it any more.

        Neither is what others have computed from it, nor what it had found, unless somebody else
        is just using that. The last who holds such a block has it zeroed.
        """
        pool, foreign = self.cache.blocks, self._held[slot].foreign
        blocks = self.cache.blocks_of(slot)
        pool.taint(b for i, b in enumerate(blocks) if i >= foreign or pool.holders(b) == 1)
        spreads = True
        while spreads:  # from sharers to those that have found these' blocks beside other copies
            spreads = False
            for other, held in self._held.items():
                own = self.cache.blocks_of(other)[held.found :]
                if self._is_tainted(other) and not pool.tainted.issuperset(own):
                    pool.taint(own)
                    spreads = True

    def _is_tainted(self, slot: int) -> bool:
        """Whether a slot has a block that nobody may find."""
        tainted = self.cache.blocks.tainted
        return bool(tainted) and not tainted.isdisjoint(self.cache.blocks_of(slot))

    def lose_all(self) -> None:
        """Gives back every slot and keeps nothing, whatever state an interruption has left."""
        with contextlib.suppress(torch.AcceleratorError):  # of a device that has failed
            self.cache.zero_blocks(self.cache.blocks.held())
        self.cache.clear(keep=self.scratch_slot)
        self._begin()
        if self.proposer is not None:
            self.proposer.lose_all()

    def reset_prefix_cache(self) -> None:
        """No block that nobody holds is found any more; running ones go on."""
        self.cache.blocks.forget_free()

    def ask_no_more(self) -> None:
        """Nothing: it has no policy."""

    def close(self) -> None:
        """Ends the use of the scratch slot."""
        if self.proposer is not None:
            self.proposer.close()
            self.proposer = None
        if self.scratch_slot is not None:
            self.cache.release(self.scratch_slot)
            self.scratch_slot = None

    # Reports --------------------------------------------------------------------------------------

    def usage(self, request: Request) -> KVUsage:
        """What a request has of the cache now or, if it has ended, had at its end; in blocks."""
        before = request.kv or KVUsage()
        if request.slot < 0:
            return before
        blocks = self.cache.blocks_of(request.slot)
        return KVUsage(
            pages=len(blocks),
            shared_pages=sum(map(self.cache.blocks.was_shared, blocks)),
            copied_bytes=self._held[request.slot].copied_bytes + before.copied_bytes,
        )

    def over_budget(self) -> bool:
        """Whether running sequences hold more than a lowered budget allows."""
        return self.cache.blocks.is_over

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the budget while running; kept blocks go first, then requests are preempted.

        The memory is allocated once: a lower budget limits its use and gives nothing back.

        Raises:
            ValueError: less than two blocks, one of which is the null block, or more than the
                cache was made for.
        """
        budget = parse_bytes(budget_bytes, "budget_bytes")
        size = self.cache.block_bytes
        if budget > self._most_bytes:
            raise ValueError(
                f"budget_bytes={budget_bytes!r} is more than the {format_bytes(self._most_bytes)} "
                "that were allocated for blocks, once and for all; give kv_cache_memory_bytes when "
                "the engine is made"
            )
        if budget < 2 * size:
            raise ValueError(
                f"budget_bytes={budget_bytes!r} is less than two blocks of {size} bytes, one of "
                "which nobody can use; raise it"
            )
        self.cache.blocks.set_limit(min(budget // size, self.cache.num_blocks) - 1)

    def check(self) -> None:
        """Verifies that owners, slots, names and blocks agree. Waits for the device.

        Raises:
            AssertionError: they do not, which is a bug.
        """
        self.cache.check()
        if self.proposer is not None:
            self.proposer.check()
        scratch = self.scratch_slot is not None
        assert self.cache.open_slots == len(self._held) + scratch, self._held
        assert self.scratch_slot not in self._held, self.scratch_slot
        for slot, held in self._held.items():
            request, blocks = held.request, self.cache.blocks_of(slot)
            assert request.slot == slot, request
            assert request.computed <= self.cache.tokens(slot), request
            assert held.named * self.cache.block_tokens <= request.computed, held
            chain = Chain(request.cache_salt, self.cache.block_tokens)
            for index in range(held.named):
                name = chain.name(request.tokens, index)
                assert held.chain.names[index] == name, (request, index)
                assert self.cache.blocks.name_of(blocks[index]) in (None, name), (request, index)
