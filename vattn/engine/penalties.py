"""Penalties on tokens that were there before: presence, frequency, repetition.

Only tokens that a request has had are touched: for each a place in the logits, a factor and an
amount. They are kept on the device: a step changes those few that its tokens have changed, and when
rows change, only those of new rows are sent.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.engine.processors import OwnProcessor, PerRequest, places
from vattn.request import Request

# New tokens per row that there is room for before everything is laid out anew.
_ROOM = 64


class Penalties(OwnProcessor):
    """``repetition_penalty``, ``frequency_penalty`` and ``presence_penalty``, in vLLM's order.

    The first is on tokens of the prompt and the output and divides positive logits and multiplies
    others; the other two are on tokens of the output and are taken off, the former once for each
    time. All tokens of these requests have arrived; none of them verifies drafts.
    """

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        super().__init__(vocab_size, upload)
        self._histories = PerRequest(_History)
        self._rows: list[_Row] = []
        self._used = 0  # entries of the tensors below
        self._at = self._factors = self._amounts = torch.zeros(0)

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`vattn.engine.processors.LogitsProcessor`."""
        self._histories.forget_ended()
        before = {row.request: row for row in self._rows}
        self._rows = [
            _Row(row * self._vocab_size, request)
            for row, request in enumerate(requests)
            if request.params.has_penalties
        ]
        if self._rows:
            self._lay_out(before)
        else:
            self._used, self._at = 0, torch.zeros(0)
            self._factors = self._amounts = self._at
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

    def _lay_out(self, before: Mapping[Request, _Row]) -> None:
        """Entries of all rows, one row after another, and room for new ones.

        Args:
            before: rows whose first entries are on the device, for other places perhaps.
        """
        parts = [self._part(row, before.get(row.request)) for row in self._rows]
        sent = [np.concatenate([part.sent[i] for part in parts]) for i in range(3)]
        shifts = np.array([part.shift for part in parts], np.int64)
        sizes = np.array([len(row.history.ids) for row in self._rows], np.int64)
        *new, shift, size = self._upload(*sent, shifts, sizes)
        self._used = int(sizes.sum())
        old = self._at, self._factors, self._amounts
        self._at, self._factors, self._amounts = (
            _joined(parts, kept, more, _ROOM * len(parts))
            for kept, more in zip(old, new, strict=True)
        )
        if shifts.any():
            # With the size of what comes out nobody asks the device for it.
            by = shift.repeat_interleave(size, output_size=self._used)
            self._at[: self._used].add_(by)
        changes = _Changes()
        first = 0
        for row, part in zip(self._rows, parts, strict=True):
            row.first, row.laid_out, row.later = first, len(row.history.ids), []
            first += row.laid_out
            for entry in part.changed:
                changes.add(row, entry, row.first + entry)
        self._write(changes)

    def _part(self, row: _Row, known: _Row | None) -> _Part:
        """What a row's entries are made of; reads the request's tokens, up to now."""
        tokens = row.request.tokens
        row.history = self._histories[row.request]
        if not row.history.is_of(tokens):
            self._histories.forget(row.request)
            row.history = self._histories[row.request]
        if known is not None and not known.is_written_of(row.history):
            known = None
        changed = row.history.extend(tokens)
        first, count, begin = 0, 0, row.begin
        if known is not None:
            first, count, begin = known.first, known.laid_out, known.begin
        at = places([(begin, row.history.ids[count:])], 1)
        factors = np.full(len(at), row.factor, np.float32)
        amounts = np.array(row.history.amounts[count:], np.float32)
        changed = [entry for entry in changed if entry < count]
        return _Part(first, count, row.begin - begin, (at, factors, amounts), changed)

    def _extend(self) -> None:
        """Takes in the tokens that have come since."""
        changes = _Changes()
        for row in self._rows:
            history, tokens = row.history, row.request.tokens
            if not (row.is_written_of(history) and history.is_of(tokens)):
                return self._lay_out({})
            for entry in history.extend(tokens):
                slot = row.first + entry
                if entry >= row.laid_out:
                    if entry - row.laid_out == len(row.later):
                        row.later.append(self._used)
                        self._used += 1
                    slot = row.later[entry - row.laid_out]
                changes.add(row, entry, slot)
        if self._used > len(self._at):
            return self._lay_out({})
        return self._write(changes)

    def _write(self, changes: _Changes) -> None:
        """The last step of what brings the device up to the histories."""
        if changes.slots:
            to, *values = self._upload(
                np.array(changes.slots, np.int64),
                np.array(changes.at, np.int64),
                np.array(changes.factors, np.float32),
                np.array(changes.amounts, np.float32),
            )
            targets = (self._at, self._factors, self._amounts)
            for target, value in zip(targets, values, strict=True):
                target.index_copy_(0, to, value)
        for row in self._rows:
            row.written = row.history.read


class _Part(NamedTuple):
    """What a row is laid out from: entries on the device, and those that are sent."""

    first: int
    kept: int  # of those on the device
    shift: int  # of all places
    sent: tuple[npt.NDArray[Any], ...]  # places, factors, amounts
    changed: list[int]  # which of those on the device have another amount


def _joined(
    parts: Sequence[_Part], old: torch.Tensor, sent: torch.Tensor, room: int
) -> torch.Tensor:
    """A column of entries on the device, and room at its end."""
    pieces, first = [], 0
    for part in parts:
        if part.kept:
            pieces.append(old[part.first : part.first + part.kept])
        if count := len(part.sent[0]):
            pieces.append(sent[first : first + count])
            first += count
    return torch.cat([*pieces, sent.new_zeros(room)])


class _Changes:
    """Entries that are new or have another amount, each of them once."""

    __slots__ = ("amounts", "at", "factors", "slots")

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.at: list[int] = []
        self.factors: list[float] = []
        self.amounts: list[float] = []

    def add(self, row: _Row, entry: int, slot: int) -> None:
        """An entry of a row, and where it is."""
        self.slots.append(slot)
        self.at.append(row.begin + row.history.ids[entry])
        self.factors.append(row.factor)
        self.amounts.append(row.history.amounts[entry])


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

    __slots__ = ("begin", "factor", "first", "history", "laid_out", "later", "request", "written")

    def __init__(self, begin: int, request: Request) -> None:
        self.begin, self.request = begin, request  # the place of token 0 in the logits
        self.factor = request.params.repetition_penalty
        self.history: _History
        self.first = self.laid_out = 0  # its first entries are one after another
        self.later: list[int] = []  # where those are that came later
        self.written = -1  # what the history had read when the device had all of it

    def is_written_of(self, history: _History) -> bool:
        """Whether the device has what this history has; not after a step that failed."""
        return self.written == history.read and self.history is history
