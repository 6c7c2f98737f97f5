"""Structured outputs: masks of the tokens that may follow, made while the model runs.

A mask has a bit for each token; see :mod:`vattn.engine.grammars` for where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.engine.grammars import Grammar
from vattn.request import Request

if TYPE_CHECKING:
    from llguidance import LLExecutor

UInt32 = npt.NDArray[np.uint32]

_ALL = np.uint32(0xFFFFFFFF)


def ended(requests: Sequence[Request]) -> list[tuple[Request, str | None]]:
    """Those whose output is complete and that no token can end, or that cannot go on.

    To be called when tokens have been appended. A request with stop tokens, the model's
    end-of-sequence tokens among them, is ended by one of these instead.

    Returns:
        Each with None if it ends well, else with what went wrong.
    """
    found: list[tuple[Request, str | None]] = []
    for request in requests:
        grammar: Grammar | None = request.grammar
        if grammar is None or request.stop_ids or request.finished:
            continue
        if not grammar.advance(_new_ids(request)):
            found.append((request, _cannot_go_on(grammar)))
        elif grammar.is_complete():
            short = request.params.min_tokens - len(request.tokens) + len(request.prompt_ids)
            found.append((request, _too_short(request) if short > 0 else None))
    return found


def explain(request: Request) -> str | None:
    """Why no token could be sampled for a request; None if its structured output is no reason."""
    grammar: Grammar | None = request.grammar
    if grammar is None:
        return None
    if grammar.error is not None:
        return _cannot_go_on(grammar)
    params = request.params
    if grammar.is_complete():
        return _too_short(request) if len(request.output_ids) < params.min_tokens else None
    names = [name for name in ("allowed_token_ids", "bad_words") if getattr(params, name)]
    if not params.bad_words and (not names or grammar.allows_any(params.allowed_token_ids or ())):
        return None
    return (
        f"no token can be sampled: {' and '.join(names)} exclude every token that structured_"
        f"outputs allow after {len(request.output_ids)} tokens; change one of them"
    )


def _cannot_go_on(grammar: Grammar) -> str:
    return f"its structured output cannot go on: {grammar.error}"


def _too_short(request: Request) -> str:
    return (
        f"its structured output is complete after {len(request.output_ids)} tokens, and "
        f"min_tokens={request.params.min_tokens} asks for more; lower it"
    )


def _new_ids(request: Request) -> list[int]:
    """Tokens of the output that its grammar has not seen."""
    return request.tokens[len(request.prompt_ids) + request.grammar.consumed :]


class StructuredMasks:
    """Leaves each row the tokens that its structured output allows; a processor of the sampler.

    Where the output may end, the tokens that end the request are allowed, and the model's
    end-of-sequence tokens nowhere else. All tokens of a request have to be on the host.

    Args:
        vocab_size: logits per row.
        upload: to where the logits are.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        self._vocab_size = vocab_size
        self._upload = upload
        (self._limits,) = upload(_limits())
        self._masks = _Masks(vocab_size)
        self._worker: ThreadPoolExecutor | None = None  # made with the first request
        self._begun: tuple[list[Request], Future[None]] | None = None
        self._requests: list[Request] = []  # those with a structured output
        self._at: torch.Tensor | None = None  # their rows; None for all

    def begin(self, requests: Sequence[Request]) -> None:
        """Starts to make masks in the background, for the rows of the next :meth:`apply`."""
        self._drop()
        some = [request for request in requests if request.grammar is not None]
        if some:
            self._worker = self._worker or ThreadPoolExecutor(1, "vattn-masks")
            self._begun = some, self._worker.submit(self._masks.fill, self._masks.advance(some))

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        rows = [row for row, request in enumerate(requests) if request.grammar is not None]
        self._requests = [requests[row] for row in rows]
        self._at = None
        if rows and len(rows) < len(requests):
            (self._at,) = self._upload(np.array(rows, np.int64))
        return bool(rows)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        (words,) = self._upload(self._take())
        octets = words.view(torch.uint8)
        limits = self._limits.index_select(0, octets.flatten().int()).view(len(words), -1)
        limits = limits[:, : self._vocab_size]
        if self._at is None:
            torch.minimum(logits, limits, out=logits)
        else:
            rows = logits.index_select(0, self._at)
            logits.index_copy_(0, self._at, torch.minimum(rows, limits, out=rows))

    def check(self) -> None:
        """Verifies that there is a mask for each row, of no more than its request has."""
        self._masks.check()

    def close(self) -> None:
        """Ends the thread."""
        self._drop()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _take(self) -> npt.NDArray[np.int32]:
        """int32 ``[r, words]``: a bit for each token, for each of the requests."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun[1].result()
        if begun is None or begun[0] != self._requests:  # compares identities
            self._masks.fill(self._masks.advance(self._requests))
        return self._masks.of(len(self._requests)).view(np.int32)

    def _drop(self) -> None:
        """Waits for masks that nobody took, since their step went wrong; so may they have."""
        if self._begun is not None:
            self._begun[1].exception()
            self._begun = None


@dataclass(frozen=True)
class _Ends:
    """Tokens that end requests, as bits of some words of the masks.

    Args:
        grammars: of the rows that it is for.
        words: which words, c of them.
        never: uint32 ``[c]``, bits that only the end of an output sets.
        at_end: uint32 ``[r, c]``, those that it sets.
        end_word: which word says whether the output may end.
        end_bit: which of its bits.
    """

    grammars: list[Grammar]
    words: list[int]
    never: UInt32
    at_end: UInt32
    end_word: int
    end_bit: np.uint32

    @staticmethod
    def of(requests: Sequence[Request], vocab_size: int) -> _Ends:
        """For rows of requests with structured outputs."""
        vocabulary = requests[0].grammar.vocabulary
        never = sorted({token for token in vocabulary.eos_token_ids if token < vocab_size})
        never.append(vocabulary.end)
        ends = [sorted(t for t in r.stop_ids if t < vocab_size) for r in requests]
        words = sorted({token // 32 for row in [never, *ends] for token in row})
        column = {word: i for i, word in enumerate(words)}
        tables = np.zeros((1 + len(requests), len(words)), np.uint32)
        for table, row in zip(tables, [never, *ends], strict=True):
            for token in row:
                table[column[token // 32]] |= np.uint32(1 << token % 32)
        return _Ends(
            grammars=[request.grammar for request in requests],
            words=words,
            never=tables[0],
            at_end=tables[1:],
            end_word=vocabulary.end // 32,
            end_bit=np.uint32(1 << vocabulary.end % 32),
        )

    def set(self, masks: UInt32, rows: list[int]) -> None:
        """Says in some rows of the masks which tokens may end them, if any may."""
        # All of them mostly, and a slice is many times faster than a list.
        some: Any = slice(len(self.grammars)) if len(rows) == len(self.grammars) else rows
        may_end = (masks[some, self.end_word] & self.end_bit) != 0
        for column, word in enumerate(self.words):
            ends = self.at_end[some, column] * may_end
            masks[some, word] = masks[some, word] & ~self.never[column] | ends


class _Masks:
    """The masks of the latest rows. Those that hold still are not made again."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._executor: LLExecutor | None = None
        self._masks = np.zeros((0, 0), np.uint32)
        self._follows: list[int] = []  # how many tokens each of them comes after; -1 for none
        self._ends: _Ends | None = None

    def of(self, rows: int) -> UInt32:
        """uint32 ``[rows, words]``, a bit for each token of the vocabulary.

        A row that cannot go on has no bit, one of a request that has ended all of them.
        """
        return self._masks[:rows, : -(-self._vocab_size // 32)]

    def advance(self, requests: Sequence[Request]) -> list[int]:
        """Takes the tokens that are new; the rows whose masks are to be made."""
        self._prepare([request.grammar for request in requests], requests)
        stale = []
        for row, request in enumerate(requests):
            grammar: Grammar = request.grammar
            if request.finished:
                self._masks[row], self._follows[row] = _ALL, -1
                continue
            assert request.in_flight == 0, f"{request.id} has tokens that are not here"
            if not grammar.advance(_new_ids(request)):
                self._masks[row], self._follows[row] = 0, -1
            elif self._follows[row] != grammar.consumed:
                stale.append(row)
                self._follows[row] = grammar.consumed
        return stale

    def fill(self, rows: list[int]) -> None:
        """Makes the masks of some rows, mostly without the GIL, and with threads of its own."""
        if not rows:
            return
        from llguidance import numpy as llguidance_numpy

        assert self._executor is not None
        assert self._ends is not None
        grammars = self._ends.grammars
        llguidance_numpy.fill_next_token_bitmask_par(
            self._executor,
            [(grammars[row].matcher, row) for row in rows],
            self._masks.view(np.int32),
        )
        self._ends.set(self._masks, rows)
        for row in rows:
            if grammars[row].matcher.is_error():
                grammars[row].fail(f"after {self._follows[row]} tokens")
                self._masks[row] = 0

    def check(self) -> None:
        """See :meth:`StructuredMasks.check`."""
        grammars = [] if self._ends is None else self._ends.grammars
        assert len(self._follows) == len(grammars) <= len(self._masks), len(self._follows)
        for grammar, follows in zip(grammars, self._follows, strict=True):
            assert -1 <= follows <= grammar.consumed, (follows, grammar.consumed)
            assert grammar.error is not None or not grammar.matcher.is_error()

    def _prepare(self, grammars: list[Grammar], requests: Sequence[Request]) -> None:
        """Forgets the masks of other rows."""
        if self._ends is not None and self._ends.grammars == grammars:
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        self._ends = _Ends.of(requests, self._vocab_size)
        self._follows = [-1] * len(requests)
        if len(self._masks) < len(requests):
            self._masks = np.zeros((len(requests), grammars[0].vocabulary.words), np.uint32)


def _limits() -> npt.NDArray[np.float32]:
    """float32 ``[256, 8]``: what eight logits are cut to by eight bits of a mask, lowest first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(np.inf), np.float32(-np.inf))
