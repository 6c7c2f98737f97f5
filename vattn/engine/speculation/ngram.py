"""Prompt lookup: what followed the last tokens of a text when it had them before.

The longest of the last n-grams that occurred before decides, and of its occurrences the latest: a
text goes on as it did lately. (vLLM takes the earliest of them; the idea is of A. Saxena, "Prompt
lookup decoding", 2023.) Where the occurrence is so late that its continuation runs into the end of
the text, the copy goes on from its own beginning, as in LZ77: what repeats is taken to go on
repeating.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import numpy as np

from vattn.engine.speculation.proposer import most_drafts
from vattn.request import Request

# N-grams are known by polynomials of their tokens modulo 2**64. Two that share one are told apart
# when they are looked up; the earlier is not found then.
_BASE = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
# From so many tokens on numpy is faster than Python.
_MANY_TOKENS = 48


class NgramIndex:
    """Where the n-grams of one growing text ended last.

    About 0.1 KB per token and size.

    Args:
        least: tokens of the shortest n-grams.
        most: of the longest.
    """

    __slots__ = ("_ends", "_last", "_least", "_most", "_powers", "_read")

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._powers = [pow(_BASE, n, 2**64) for n in range(most)]
        # Per size, by n-gram: the position of the token that followed it last.
        self._ends: list[dict[int, int]] = [{} for _ in range(most - least + 1)]
        self._read = 0  # n-grams that end before this position are known
        self._last: tuple[int, list[int]] = (-1, [])  # the position looked up last, and its n-grams

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """The next tokens, if the last ones have been there before.

        Args:
            tokens: the text; each time that of the last call with more at its end.
            count: how many to propose.

        Returns:
            ``count`` tokens, or none.
        """
        self._extend(tokens)
        length = len(tokens)
        keys = self._keys_at(tokens, length - 1)
        self._last = length - 1, keys
        for i in range(len(keys) - 1, -1, -1):
            at = self._ends[i].get(keys[i])
            if at is None:
                continue
            size = self._least + i
            if tokens[at - size : at] == tokens[length - size :]:
                found = tokens[at : at + count]
                return (found * -(-count // len(found)))[:count]
        return []

    def _extend(self, tokens: list[int]) -> None:
        """Learns the n-grams that end before the last token."""
        end = len(tokens) - 1
        if end - self._read >= _MANY_TOKENS:
            self._extend_by_many(tokens, end)
        for position in range(self._read, end):
            looked_up, keys = self._last
            if position != looked_up:
                keys = self._keys_at(tokens, position)
            for ends, key in zip(self._ends, keys, strict=False):
                ends[key] = position + 1
        self._read = max(self._read, end)

    def _extend_by_many(self, tokens: list[int], last: int) -> None:
        first = max(0, self._read - self._most + 1)
        ids = np.array(tokens[first:last], np.uint64)
        keys = np.zeros(len(ids), np.uint64)
        for size in range(1, self._most + 1):
            shifted = ids[: len(ids) - size + 1] * np.uint64(self._powers[size - 1])
            keys = keys[-len(shifted) :] + shifted if len(shifted) else keys[:0]
            if size >= self._least:
                begin = max(self._read, first + size - 1)  # the first end that is new
                new = keys[begin - (first + size - 1) :].tolist()
                self._ends[size - self._least].update(
                    zip(new, range(begin + 1, last + 1), strict=True)
                )
        self._read = last

    def _keys_at(self, tokens: list[int], end: int) -> list[int]:
        """Of the n-grams whose last token is at ``end``, shortest first; fewer at the beginning."""
        last = tokens[max(0, end + 1 - self._most) : end + 1]
        keys = itertools.accumulate(map(operator.mul, reversed(last), self._powers))
        return [key & _MASK for key in itertools.islice(keys, self._least - 1, None)]


class NgramProposer:
    """Drafts from the requests' own texts; see :class:`.proposer.Proposer`. It has no pages.

    Args:
        count: most drafts of a request.
        least: tokens of the shortest n-grams that are looked up.
        most: of the longest.
    """

    def __init__(self, count: int, least: int, most: int) -> None:
        self._count = count
        self._least, self._most = least, most
        self._indices: dict[Request, NgramIndex] = {}

    @property
    def fixed_pages(self) -> int:
        """See :class:`.proposer.Proposer`."""
        return 0

    def propose(self, requests: Sequence[Request]) -> None:
        """See :class:`.proposer.Proposer`."""
        for request in requests:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = NgramIndex(self._least, self._most)
            count = min(self._count, most_drafts(request))
            request.drafts = index.propose(request.tokens, count)

    def let_go(self, request: Request) -> None:
        """See :class:`.proposer.Proposer`."""
        self._indices.pop(request, None)

    def relieve(self) -> bool:
        """See :class:`.proposer.Proposer`."""
        return False

    def live_pages(self) -> int:
        """See :class:`.proposer.Proposer`."""
        return 0

    def held_bytes(self) -> int:
        """See :class:`.proposer.Proposer`."""
        return 0

    def lose_all(self) -> None:
        """See :class:`.proposer.Proposer`."""
        self._indices.clear()

    def close(self) -> None:
        """See :class:`.proposer.Proposer`."""
        self._indices.clear()

    def check(self) -> None:
        """See :class:`.proposer.Proposer`."""
        assert all(not request.finished for request in self._indices), self._indices
