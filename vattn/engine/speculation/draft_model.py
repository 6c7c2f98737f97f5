"""Drafts from a small model of the same tokenizer, with a KV cache of its own in the same pages.

Beside each request that it drafts for it keeps a sequence, which follows the request's tokens: what
it had guessed wrong is cut off, what it has not seen is computed, and then it guesses greedily, one
step of all sequences per draft. Between these steps nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vattn._core import DriverError, OutOfPages
from vattn.engine.batch import SAMPLED, StepBatch
from vattn.engine.runner import ModelRunner
from vattn.engine.speculation.proposer import most_drafts
from vattn.kv.cache import KVCache
from vattn.request import Request

_log = logging.getLogger(__name__)

# Share of the pool's pages that are left alone when a sequence is opened: whoever runs grows, and
# what it would take from the drafts then would have been computed in vain.
_WATERMARK = 0.05


@dataclass(slots=True, eq=False)
class _Sequence:
    """What the draft model has computed of one request.

    ``certain`` tokens of the request are in the slot, and then those of ``guessed``.
    """

    request: Request
    slot: int  # -1 if its logits were no numbers: it is left alone then
    certain: int = 0
    guessed: list[int] = field(default_factory=list)

    @property
    def uncomputed(self) -> int:
        """Tokens of the request to compute before the first guess."""
        return len(self.request.tokens) - self.certain


@dataclass(slots=True)
class _Work:
    """What is done for one sequence now: ``tokens`` to compute, then ``drafts`` to guess."""

    sequence: _Sequence
    tokens: int
    drafts: int

    @property
    def length(self) -> int:
        """Tokens in the slot afterwards; the last guess is not computed."""
        return self.sequence.certain + self.tokens + max(0, self.drafts - 1)


class DraftModel:
    """Drafts from a model; see :class:`.proposer.Proposer`.

    Args:
        runner: of the draft model.
        cache: its KV cache, on the pool of the model that it drafts for, with as many slots as
            requests run.
        count: most drafts of a request.
        max_tokens: most tokens of a step.
        max_length: longest sequence in tokens; requests beyond it get no drafts.
        scratch_slot: of the cache, open for as long as it lives; None for none.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        *,
        count: int,
        max_tokens: int,
        max_length: int,
        scratch_slot: int | None = None,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self._count = count
        self._max_tokens = max_tokens
        self._max_length = max_length
        self._scratch_slot = scratch_slot
        self._sequences: dict[Request, _Sequence] = {}

    # Drafts ---------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Request]) -> None:
        """See :class:`.proposer.Proposer`. Where pages are short it proposes nothing."""
        work = self._divide([s for r in requests if (s := self._sequence(r)) is not None])
        while work and not self._ensure(work):
            self.let_go(work.pop().sequence.request)
        if work:
            self._run(work)

    def _divide(self, sequences: list[_Sequence]) -> list[_Work]:
        """Who computes how much: those that are nearly up to date first, which are most."""
        sequences.sort(key=lambda s: (s.uncomputed, s.slot))
        room, work = self._max_tokens, []
        for sequence in sequences:
            tokens = min(sequence.uncomputed, room)
            if not tokens:
                break
            drafts = 0
            if tokens == sequence.uncomputed:
                left = self._max_length - len(sequence.request.tokens)
                drafts = min(self._count, most_drafts(sequence.request), left)
            work.append(_Work(sequence, tokens, drafts))
            room -= tokens
        return work

    def _ensure(self, work: list[_Work]) -> bool:
        """Maps all that they will write; False if pages are short."""
        slots = np.array([w.sequence.slot for w in work], np.int32)
        try:
            self.cache.ensure_many(slots, np.array([w.length for w in work], np.int32))
        except OutOfPages:
            return False
        return True

    def _run(self, work: list[_Work]) -> None:
        """Computes what is missing, guesses, and tells the requests."""
        told: list[tuple[list[_Work], torch.Tensor]] = []
        first = sorted((w for w in work if w.tokens == 1 and w.drafts), key=_by_slot)
        chunks = [w for w in work if w.tokens > 1 or not w.drafts]
        guessing = first + [w for w in chunks if w.drafts]
        batch = _catch_up(first, chunks)
        for w in work:
            w.sequence.certain += w.tokens
        told.append((guessing, self._step(batch)))
        guessing = sorted(guessing, key=_by_slot)
        for position in range(1, max((w.drafts for w in guessing), default=0)):
            guessing = [w for w in guessing if w.drafts > position]
            told.append((guessing, self._step(_guess(guessing, position))))
        self._tell(told)

    @torch.inference_mode()
    def _step(self, batch: StepBatch) -> torch.Tensor:
        """The likeliest next tokens, int64 ``[R]`` on the device; -1 where they are no numbers."""
        logits = self.runner.run(batch)
        if not len(batch.logit_rows):
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        best, tokens = logits.max(1)
        self.runner.remember(batch, tokens)
        return torch.where(best.isfinite(), tokens, -1)

    def _tell(self, told: list[tuple[list[_Work], torch.Tensor]]) -> None:
        """Hands the guesses over; waits for the device, once."""
        tokens = torch.cat([guesses for _, guesses in told]).tolist()
        drafts: dict[_Sequence, list[int]] = {}
        at = 0
        for guessing, _ in told:
            for work in guessing:
                drafts.setdefault(work.sequence, []).append(tokens[at])
                at += 1
        for sequence, guesses in drafts.items():
            if min(guesses) < 0:
                self._give_up(sequence)
            else:
                sequence.guessed = guesses[:-1]
                sequence.request.drafts = guesses

    # Sequences ------------------------------------------------------------------------------------

    def _sequence(self, request: Request) -> _Sequence | None:
        """The request's, with none but the request's tokens; None if there is no place for it."""
        sequence = self._sequences.get(request)
        if len(request.tokens) >= self._max_length:
            self.let_go(request)
            return None
        if sequence is None:
            sequence = self._open(request)
            if sequence is not None:
                self._sequences[request] = sequence
            return sequence
        if sequence.slot < 0:
            return None
        self._rewind(sequence)
        return sequence

    def _rewind(self, sequence: _Sequence) -> None:
        """Cuts off what was guessed wrong. At least one token is left to compute."""
        tokens, guessed = sequence.request.tokens, sequence.guessed
        begin = certain = sequence.certain
        most = min(begin + len(guessed), len(tokens) - 1)
        while certain < most and tokens[certain] == guessed[certain - begin]:
            certain += 1
        sequence.certain, sequence.guessed = min(certain, most), []
        if self.cache.tokens(sequence.slot) > sequence.certain:
            self.cache.truncate(sequence.slot, sequence.certain)

    def _open(self, request: Request) -> _Sequence | None:
        """A sequence for a request, if there are pages for it; a fork of its first sample's."""
        total = min(len(request.tokens) + self._count, self._max_length)
        slot, shared = self._source(request)
        needed = self.cache.admission_pages(total, source=slot, shared_tokens=shared)
        stats = self.cache.pool.core.stats()
        spare = int(_WATERMARK * (stats["budget_bytes"] // stats["page_bytes"]))
        if needed > self.cache.pool.core.available_pages() - spare:
            return None
        try:
            if slot is None:
                opened = self.cache.open(expected_tokens=total)
            else:
                opened = self.cache.fork(slot, shared)
        except OutOfPages:  # and OutOfSlots
            return None
        return _Sequence(request, int(opened), shared)

    def _source(self, request: Request) -> tuple[int | None, int]:
        """The slot that has the beginning of a request, and how many tokens of it."""
        source = None if request.source is None else self._sequences.get(request.source)
        if source is None or source.slot < 0:
            return None, 0
        shared = min(source.certain, len(request.prompt_ids), len(request.tokens) - 1)
        if shared < max(1, self.cache.lowest(source.slot)):
            return None, 0
        return source.slot, shared

    def _give_up(self, sequence: _Sequence) -> None:
        """Its K and V may be no numbers: nobody is to read them, and it is not tried again."""
        _log.warning("the draft model's logits for request %s are not finite", sequence.request.id)
        self.cache.mark_dirty(sequence.slot)
        self.cache.release(sequence.slot)
        sequence.slot, sequence.certain, sequence.guessed = -1, 0, []

    # See Proposer ---------------------------------------------------------------------------------

    def let_go(self, request: Request) -> None:
        """See :class:`.proposer.Proposer`."""
        sequence = self._sequences.pop(request, None)
        if sequence is not None and sequence.slot >= 0:
            self.cache.release(sequence.slot)

    def relieve(self) -> bool:
        """Gives up the sequence that was opened last; see :class:`.proposer.Proposer`."""
        for request in reversed(self._sequences):
            if self._sequences[request].slot >= 0:
                self.let_go(request)
                return True
        return False

    def live_pages(self) -> int:
        """See :class:`.proposer.Proposer`."""
        stats = self.cache.stats()
        live = (stats.live_bytes + stats.cover_bytes) // stats.page_bytes
        return max(0, live - self.fixed_pages)

    @property
    def fixed_pages(self) -> int:
        """See :class:`.proposer.Proposer`; the scratch slot's."""
        return 0 if self._scratch_slot is None else self.cache.admission_pages(1)

    def held_bytes(self) -> int:
        """See :class:`.proposer.Proposer`."""
        own = self.cache.stats()
        return own.live_bytes + own.cover_bytes + own.stale_bytes + own.scratch_bytes

    def lose_all(self) -> None:
        """See :class:`.proposer.Proposer`."""
        self._sequences = {}
        for slot in range(self.cache.max_seqs):
            if self.cache.is_open(slot) and slot != self._scratch_slot:
                with contextlib.suppress(DriverError):  # the others are given back all the same
                    self.cache.mark_dirty(slot)
                    self.cache.release(slot)
        self.cache.trim()

    def close(self) -> None:
        """See :class:`.proposer.Proposer`."""
        for request in list(self._sequences):
            self.let_go(request)
        if self._scratch_slot is not None and self.cache.is_open(self._scratch_slot):
            self.cache.release(self._scratch_slot)
        self._scratch_slot = None
        self.cache.close()

    def check(self) -> None:
        """See :class:`.proposer.Proposer`."""
        self.cache.check()
        going = [s for s in self._sequences.values() if s.slot >= 0]
        scratch = self._scratch_slot is not None
        assert self.cache.stats().open_slots == len(going) + scratch, self._sequences
        assert len({s.slot for s in going}) == len(going), going
        for request, sequence in self._sequences.items():
            assert sequence.request is request, request
            assert request.slot >= 0, request  # whoever ends or gives way is let go
        for s in going:
            assert s.slot != self._scratch_slot, s
            assert self.cache.tokens(s.slot) == s.certain + len(s.guessed), s
            assert s.certain <= len(s.request.tokens), s


def _by_slot(work: _Work) -> int:
    return work.sequence.slot


def _catch_up(decodes: list[_Work], chunks: list[_Work]) -> StepBatch:
    """The step that computes what the draft model has not seen of the requests."""
    ids: list[int] = []
    rows: list[int] = []
    for work in [*decodes, *chunks]:
        first = work.sequence.certain
        ids += work.sequence.request.tokens[first : first + work.tokens]
        if work.drafts:
            rows.append(len(ids) - 1)
    sequences = [*decodes, *chunks]
    return StepBatch(
        slots=np.array([w.sequence.slot for w in sequences], np.int32),
        query_lens=np.array([w.tokens for w in sequences], np.int32),
        kv_lens=np.array([w.sequence.certain + w.tokens for w in sequences], np.int32),
        num_decodes=len(decodes),
        input_ids=np.array(ids, np.int64),
        logit_rows=np.array(rows, np.int64),
        sample_slots=np.array([w.sequence.slot for w in sequences if w.drafts], np.int64),
    )


def _guess(guessing: list[_Work], position: int) -> StepBatch:
    """The step that computes the guess before draft ``position``, which only the device knows."""
    count = len(guessing)
    slots = np.array([w.sequence.slot for w in guessing], np.int32)
    lengths = np.array([w.sequence.certain + position for w in guessing], np.int32)
    return StepBatch(
        slots=slots,
        query_lens=np.ones(count, np.int32),
        kv_lens=lengths,
        num_decodes=count,
        input_ids=np.full(count, SAMPLED, np.int64),
        logit_rows=np.arange(count),
        sample_slots=slots.astype(np.int64),
    )
