"""``allowed_token_ids``: rows that keep a few tokens, all but a few, or what a mask says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch

from vattn.attention.upload import Uploader
from vattn.engine.pieces import pieces
from vattn.engine.processors import Ids, OwnProcessor, PerRequest, places
from vattn.request import Request

# Tokens of a row that are listed anew whenever rows change; a mask is no more than these lists.
_MOST_LISTED = 1024


class AllowedTokens(OwnProcessor):
    """No token but those of ``allowed_token_ids``."""

    def __init__(self, vocab_size: int, upload: Uploader) -> None:
        super().__init__(vocab_size, upload)
        self._sets = PerRequest(self._of)
        # Those in use, by the identity of what they were made of, which they hold.
        self._known: WeakValueDictionary[int, _Allowed] = WeakValueDictionary()
        self._rows: torch.Tensor | None = None  # that keep a few tokens, at `_kept`
        self._kept: torch.Tensor | None = None
        self._banned: torch.Tensor | None = None  # of rows that keep all but a few
        self._used: list[_Allowed] = []  # by other rows
        self._masks = torch.zeros(0)  # bool [used, V]: what is not allowed
        self._masked: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, the mask of each

    def _of(self, request: Request) -> _Allowed:
        ids = request.params.allowed_token_ids
        assert ids is not None
        found = self._known.get(id(ids))
        if found is None:
            found = self._known[id(ids)] = _Allowed(ids, self._vocab_size)
        return found

    def update(self, requests: Sequence[Request]) -> bool:
        """See :class:`.processors.LogitsProcessor`."""
        self._sets.forget_ended()
        few: list[tuple[int, Ids]] = []
        most: list[tuple[int, Ids]] = []
        masked: dict[int, _Allowed] = {}
        for row, request in enumerate(requests):
            if request.params.allowed_token_ids is not None:
                each = self._sets[request]
                if each.listed is None:
                    masked[row] = each
                else:
                    (few if each.is_kept else most).append((row, each.listed))
        self._rows = self._kept = self._banned = None
        if few:
            rows = np.array([row for row, _ in few], np.int64)
            self._rows, self._kept = self._upload(rows, places(few, self._vocab_size))
        if most:
            (self._banned,) = self._upload(places(most, self._vocab_size))
        self._take_masks(masked)
        return bool(few or most or masked)

    def _take_masks(self, masked: Mapping[int, _Allowed]) -> None:
        """A mask goes to the device once; when rows change, only their numbers do."""
        used = list(dict.fromkeys(masked.values()))
        if new := [each for each in used if each.on_device is None]:
            for each, mask in zip(new, self._upload(*(each.mask for each in new)), strict=True):
                each.on_device = mask
        if used != self._used:
            masks = [each.on_device for each in used if each.on_device is not None]
            self._used, self._masks = used, torch.stack(masks) if masks else torch.zeros(0)
        self._masked = None
        if masked:
            numbers = {each: i for i, each in enumerate(used)}
            which = np.array([numbers[each] for each in masked.values()], np.int64)
            rows, which_mask = self._upload(np.array(list(masked), np.int64), which)
            self._masked = rows, which_mask

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """See :class:`.processors.LogitsProcessor`."""
        flat = logits.view(-1)
        if self._rows is not None and self._kept is not None:
            values = flat.index_select(0, self._kept)
            logits.index_fill_(0, self._rows, -math.inf)
            flat.index_copy_(0, self._kept, values)
        if self._banned is not None:
            flat.index_fill_(0, self._banned, -math.inf)
        if self._masked is not None:
            rows, which = self._masked
            for piece in pieces(logits, len(rows)):
                masks = self._masks.index_select(0, which[piece])
                some = logits.index_select(0, rows[piece]).masked_fill_(masks, -math.inf)
                logits.index_copy_(0, rows[piece], some)


class _Allowed:
    """What one ``allowed_token_ids`` keeps, in the shorter of two lists, or as a mask."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._ids = ids
        self.mask = np.ones(vocab_size, np.bool_)  # of what is not allowed
        self.mask[np.fromiter(ids, np.int64, len(ids))] = False
        banned = int(np.count_nonzero(self.mask))
        self.is_kept = 2 * banned >= vocab_size  # whether what is listed is kept, not banned
        self.listed: Ids | None = None
        if min(banned, vocab_size - banned) <= _MOST_LISTED:
            self.listed = np.flatnonzero(~self.mask if self.is_kept else self.mask)
        self.on_device: torch.Tensor | None = None
