"""Penalties on tokens that were there before: presence, frequency, repetition.

Only tokens that a request has had are touched: for each a place in the logits, a factor and an
amount. They are kept on the device, and a step changes those few that its tokens have changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from vattn.attention.upload import Uploader
from vattn.engine.processors import PerRequest, places
from vattn.request import Request

# New tokens per row that there is room for before everything is laid out anew.
_ROOM = 64


class Penalties:
    """``repetition_penalty``, ``frequency_penalty`` and ``presence_penalty``, in vLLM's order.

    The first is on tokens of the prompt and the output and divides positive logits and multiplies
    others; the other two are on tokens of the output and are taken off, the former once for each
    time. All tokens of these requests have arrived; none of them verifies drafts.

    Args:
        vocab_size: logits per row.
        upload: to the device.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        self._vocab_size = vocab_size
        self._upload = upload
        self._histories = PerRequest(_History)
        self._rows: list[_Row] = []
        self._used = 0  # entries of the tensors below
        self._at = self._factors = self._amounts = torch.zeros(0)

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        self._histories.forget_ended()
        self._rows = [
            _Row(row * self._vocab_size, request)
            for row, request in enumerate(requests)
            if request.params.has_penalties
        ]
        if self._rows:
            self._lay_out()
        return bool(self._rows)

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        self._extend()
        used, flat = self._used, logits.view(-1)
        at, factors = self._at[:used], self._factors[:used]
        values = flat.index_select(0, at)
        values = torch.where(values > 0, values / factors, values * factors)
        flat.index_copy_(0, at, values.sub_(self._amounts[:used]))

    def check(self) -> None:
        """Verifies that each token of each row has one entry, with the right amount."""
        at = self._at[: self._used].tolist()
        assert len(set(at)) == len(at) == sum(len(row.history.ids) for row in self._rows)
        amounts = dict(zip(at, self._amounts[: self._used].tolist(), strict=True))
        for row in self._rows:
            row.history.check(row.request)
            for token, amount in zip(row.history.ids, row.history.amounts, strict=True):
                assert amounts[row.begin + token] == amount, (row.begin, token)

    def _lay_out(self) -> None:
        """Entries of all rows from the beginning, and room for new ones."""
        for row in self._rows:
            row.history = self._history(row.request)
        sizes = [len(row.history.ids) for row in self._rows]
        self._used = sum(sizes)
        total = self._used + _ROOM * len(self._rows)
        at = np.zeros(total, np.int64)
        factors, amounts = np.ones(total, np.float32), np.zeros(total, np.float32)
        at[: self._used] = places([(row.begin, row.history.ids) for row in self._rows], 1)
        repetition = [row.factor for row in self._rows]
        factors[: self._used] = np.repeat(np.array(repetition, np.float32), sizes)
        np.concatenate([row.history.amounts for row in self._rows], out=amounts[: self._used])
        self._at, self._factors, self._amounts = self._upload(at, factors, amounts)
        first = 0
        for row, size in zip(self._rows, sizes, strict=True):
            row.first, row.laid_out, row.later = first, size, []
            first += size

    def _history(self, request: Request) -> _History:
        """Its tokens, up to now."""
        history = self._histories[request]
        if not history.is_of(request.tokens):
            self._histories.forget(request)
            history = self._histories[request]
        history.extend(request.tokens)
        return history

    def _extend(self) -> None:
        """Takes in the tokens that have come since."""
        slots: list[int] = []  # of entries that are new or have another amount, each of them once
        at: list[int] = []
        factors: list[float] = []
        amounts: list[float] = []
        for row in self._rows:
            history, tokens = row.history, row.request.tokens
            if not history.is_of(tokens):
                return self._lay_out()
            for entry in history.extend(tokens):
                slot = row.first + entry
                if entry >= row.laid_out:
                    if entry - row.laid_out == len(row.later):
                        row.later.append(self._used)
                        self._used += 1
                    slot = row.later[entry - row.laid_out]
                slots.append(slot)
                at.append(row.begin + history.ids[entry])
                factors.append(row.factor)
                amounts.append(history.amounts[entry])
        if self._used > len(self._at):
            return self._lay_out()
        if slots:
            self._write(slots, at, factors, amounts)
        return None

    def _write(
        self, slots: list[int], at: list[int], factors: list[float], amounts: list[float]
    ) -> None:
        to, *values = self._upload(
            np.array(slots, np.int64),
            np.array(at, np.int64),
            np.array(factors, np.float32),
            np.array(amounts, np.float32),
        )
        targets = (self._at, self._factors, self._amounts)
        for target, value in zip(targets, values, strict=True):
            target.index_copy_(0, to, value)


class _History:
    """The tokens that a request has had, each once, and what is taken off the logit of each."""

    __slots__ = ("_counts", "_entries", "_frequency", "_presence", "amounts", "ids", "last", "read")

    def __init__(self, request: Request) -> None:
        params = request.params
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self.read = len(request.prompt_ids)  # of request.tokens
        self.last = request.prompt_ids[-1]
        known = sorted(set(request.prompt_ids)) if params.repetition_penalty != 1 else []
        self.ids = array("i", known)
        self.amounts = array("f", bytes(4 * len(known)))
        self._counts = array("i", bytes(4 * len(known)))  # in the output
        self._entries = {token: entry for entry, token in enumerate(known)}

    def is_of(self, tokens: list[int]) -> bool:
        """Whether what was read is, as far as its last token tells, how the tokens begin."""
        return len(tokens) >= self.read and tokens[self.read - 1] == self.last

    def extend(self, tokens: list[int]) -> list[int]:
        """Reads the tokens that are new; the entries that changed, each once, new ones in order."""
        changed = [entry for token in tokens[self.read :] if (entry := self._add(token)) >= 0]
        self.read, self.last = len(tokens), tokens[-1]
        return changed if len(changed) < 2 else list(dict.fromkeys(changed))

    def _add(self, token: int) -> int:
        """Counts a token of the output; its entry, or -1 if that stays as it is."""
        entry = self._entries.get(token)
        if entry is None:
            self._entries[token] = len(self.ids)
            self.ids.append(token)
            self._counts.append(1)
            self.amounts.append(self._presence + self._frequency)
            return len(self.ids) - 1
        count = self._counts[entry] + 1
        self._counts[entry] = count
        if not self._frequency and (count > 1 or not self._presence):
            return -1
        self.amounts[entry] = self._presence + self._frequency * count
        return entry

    def check(self, request: Request) -> None:
        """Verifies it against the request's tokens."""
        output = request.tokens[len(request.prompt_ids) : self.read]
        wanted = set(output)
        if request.params.repetition_penalty != 1:
            wanted |= set(request.prompt_ids)
        assert set(self.ids) == wanted, request.id
        assert len(set(self.ids)) == len(self.ids), request.id
        for token, count in zip(self.ids, self._counts, strict=True):
            assert count == output.count(token), (request.id, token)


class _Row:
    """A row with penalties, and where its entries are."""

    __slots__ = ("begin", "factor", "first", "history", "laid_out", "later", "request")

    def __init__(self, begin: int, request: Request) -> None:
        self.begin, self.request = begin, request  # the place of token 0 in the logits
        self.factor = request.params.repetition_penalty
        self.history: _History
        self.first = self.laid_out = 0  # its first entries are one after another
        self.later: list[int] = []  # where those are that came later
