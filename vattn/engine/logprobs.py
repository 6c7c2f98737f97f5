"""Log probabilities of chosen tokens and of the likeliest, of all rows that want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vattn.attention.upload import Uploader
from vattn.engine.largest import Largest
from vattn.engine.pieces import pieces
from vattn.sampling_params import ALL_LOGPROBS

# Rows that want few tokens do not wait for those that want many, or all of them.
_CLASSES = (32, 1024)


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of L rows, on the device.

    Natural logarithms, of the logits as the model gave them: before temperature and filters, as
    vLLM's ``raw_logprobs``. A rank is 1 for the likeliest token and for those as likely as it.
    """

    rows: list[int]
    counts: list[int]  # how many of the likeliest each asked for
    logprob: torch.Tensor  # float32 [L], of the chosen token
    rank: torch.Tensor  # int64 [L]
    top_ids: torch.Tensor  # int64 [L, K], K at least the largest count
    top_logprobs: torch.Tensor  # float32 [L, K]


@dataclass(frozen=True)
class Scores:
    """Log probabilities of tokens that were given, not sampled: those of prompts.

    Args:
        logprobs: their rows are numbers of the tokens.
        targets: the tokens.
    """

    logprobs: tuple[Logprobs, ...]
    targets: list[int]


class LogprobRows:
    """Which rows want log probabilities, and how many; holds as long as the rows are the same.

    Args:
        wanted: per row how many of the likeliest tokens, :data:`ALL_LOGPROBS` for all, None for no
            log probabilities at all.
        vocab_size: logits per row.
        upload: to the device.
    """

    def __init__(self, wanted: Sequence[int | None], vocab_size: int, upload: Uploader) -> None:
        classes: dict[int, list[tuple[int, int]]] = {}
        for row, count in enumerate(wanted):
            if count is None:
                continue
            capped = vocab_size if count == ALL_LOGPROBS else min(count, vocab_size)
            kind = sum(capped > limit for limit in _CLASSES)
            classes.setdefault(kind, []).append((row, capped))
        self._groups: list[tuple[list[int], list[int], torch.Tensor | None]] = []
        for members in classes.values():
            rows = [row for row, _ in members]
            at = None
            if len(rows) < len(wanted):
                (at,) = upload(np.array(rows, np.int64))
            self._groups.append((rows, [count for _, count in members], at))

    def __bool__(self) -> bool:
        """Whether any row wants some."""
        return bool(self._groups)

    def of(
        self, logits: torch.Tensor, tokens: torch.Tensor, largest: Largest | None = None
    ) -> tuple[Logprobs, ...]:
        """Their log probabilities.

        Args:
            logits: float32 ``[R, V]``, as the model gave them; they are not changed.
            tokens: int64 ``[R]``, the chosen ones.
            largest: of ``logits``, if somebody has looked at them before.
        """
        found = []
        for rows, counts, at in self._groups:
            some, chosen, seen = logits, tokens, largest
            if at is not None:
                some, chosen, seen = some.index_select(0, at), chosen.index_select(0, at), None
            found.append(_logprobs(rows, counts, some, chosen[:, None], seen or Largest(some)))
        return tuple(found)


def _logprobs(
    rows: list[int],
    counts: list[int],
    logits: torch.Tensor,
    chosen: torch.Tensor,
    largest: Largest,
) -> Logprobs:
    top, top_ids = largest.top(max(1, *counts))
    logit = logits.gather(1, chosen)
    wanted = torch.cat([chosen, top_ids], 1)
    logprobs = torch.empty(wanted.shape, dtype=torch.float32, device=logits.device)
    room = None
    for piece in pieces(logits):
        if room is None or len(room) != len(logits[piece]):
            room = torch.empty_like(logits[piece])
        torch.log_softmax(logits[piece], 1, out=room)
        torch.gather(room, 1, wanted[piece], out=logprobs[piece])
    return Logprobs(
        rows=rows,
        counts=counts,
        logprob=logprobs[:, 0],
        rank=_ranks(logits, logit, top),
        top_ids=top_ids,
        top_logprobs=logprobs[:, 1:],
    )


def _ranks(logits: torch.Tensor, logit: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """int64 ``[L]``: one more than how many logits are larger than ``logit`` ``[L, 1]``."""
    if logits.is_cuda:  # to look which rows need a search would be a wait
        return _ranks_of_all(logits, logit)
    above = (top > logit).sum(1)
    rows = (above == top.shape[1]).nonzero()[:, 0]
    if top.shape[1] == logits.shape[1]:
        rows = rows[:0]
    return _count(logits, logit, rows, above) + 1


def _ranks_of_all(logits: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """The same by a search of every row."""
    rows = torch.arange(len(logits), device=logits.device)
    return _count(logits, logit, rows, torch.empty_like(rows)) + 1


def _count(
    logits: torch.Tensor, logit: torch.Tensor, rows: torch.Tensor, above: torch.Tensor
) -> torch.Tensor:
    """``above`` with, in some rows, how many logits are larger than ``logit``."""
    for piece in pieces(logits, len(rows)):
        some = logits.index_select(0, rows[piece])
        count = some.gt_(logit[rows[piece]]).sum(1)  # as floats: added faster, and exactly
        above.index_copy_(0, rows[piece], count.long())
    return above
