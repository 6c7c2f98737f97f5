"""Masks of structured outputs on the host, and what becomes of a grammar that breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vattn.engine.grammars import Grammar
from vattn.request import Request

if TYPE_CHECKING:
    from llguidance import LLExecutor

UInt32 = npt.NDArray[np.uint32]

_ALL = np.uint32(0xFFFFFFFF)


def advance(request: Request) -> bool:
    """Has a request's grammar take its new tokens; False if it cannot go on."""
    return ask(request.grammar, request.grammar.advance, _new_ids(request))


def ask(grammar: Grammar, question: Callable[..., bool], *given: Any) -> bool:
    """What a grammar answers. If it breaks instead, its request cannot go on, and only that."""
    try:
        return question(*given)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such is a panic of Rust
        _broke(grammar, error)
        return False


def _broke(grammar: Grammar, error: BaseException) -> None:
    grammar.error = f"llguidance failed: {type(error).__name__}: {error}"


def _new_ids(request: Request) -> list[int]:
    """Tokens of the output that its grammar has not seen."""
    return request.tokens[len(request.prompt_ids) + request.grammar.consumed :]


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


class Masks:
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
            if not advance(request):
                self._masks[row], self._follows[row] = 0, -1
            elif self._follows[row] != grammar.consumed:
                stale.append(row)
                self._follows[row] = grammar.consumed
        return stale

    def fill(self, rows: list[int]) -> None:
        """Makes the masks of some rows, mostly without the GIL, and with threads of its own.

        A row whose mask cannot be made cannot go on; the others can.
        """
        if not rows:
            return
        try:
            self._make(rows)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # such is a panic of Rust
            if len(rows) > 1:  # whose is it?
                for row in rows:
                    self.fill([row])
                return
            assert self._ends is not None
            _broke(self._ends.grammars[rows[0]], error)
            self._masks[rows] = 0

    def _make(self, rows: list[int]) -> None:
        from llguidance import LLExecutor
        from llguidance import numpy as llguidance_numpy

        assert self._ends is not None
        self._executor = self._executor or LLExecutor()
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
        self._ends = _Ends.of(requests, self._vocab_size)
        self._follows = [-1] * len(requests)
        if len(self._masks) < len(requests):
            self._masks = np.zeros((len(requests), grammars[0].vocabulary.words), np.uint32)
