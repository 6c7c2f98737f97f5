"""Which tokens min_p, top_k and top_p leave, as one lowest logit per row.

Each of the three keeps the likeliest tokens down to some logit, and so do they together. That logit
is all that is computed here; nothing is put back in order. Tokens as likely as the last one kept
are kept too, so the set does not depend on how a sort breaks ties.

The order is vLLM's (temperature, min_p, top_k, top_p): top_p counts probability among the tokens
that the others have left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader
from vattn.engine.largest import Largest
from vattn.engine.pieces import pieces
from vattn.sampling_params import SamplingParams

# Rows of top_p look among so many tokens first, where looking again costs no wait for the device.
_FIRST_LOOK = 256
_NEXT_LOOK = 8
# Rows of top_p whose top_k is at most this need no sort.
_SMALL_TOP_K = 1024


@dataclass(frozen=True)
class _Group:
    """Rows that need the same step. ``rows`` is None for all, else int64 on the device."""

    rows: torch.Tensor | None
    values: torch.Tensor  # [r, 1], the step's parameter
    largest: int  # the largest value, if they are whole

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Writes its rows."""
        if self.rows is None:
            tensor.copy_(values)
        else:
            tensor.index_copy_(0, self.rows, values)


class Filters:
    """The filters of a batch of rows. It holds as long as the rows are the same.

    Args:
        params: of each row.
        vocab_size: logits per row.
        upload: to where the logits are.
    """

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, upload: Uploader) -> None:
        self._count = len(params)
        top_k = {i: p.top_k for i, p in enumerate(params) if 0 < p.top_k < vocab_size}
        top_p = {i: p.top_p for i, p in enumerate(params) if p.top_p < 1}
        few = [i for i in top_p if i in top_k and top_k[i] <= _SMALL_TOP_K]
        min_p = {i: math.log(p.min_p) for i, p in enumerate(params) if p.min_p}
        few_p = {i: top_p.pop(i) for i in few}
        few_k = {i: top_k.pop(i) for i in few}
        groups = self._groups(upload, min_p, few_p, few_k, top_k, top_p)
        self._min_p, self._few_p, self._few_k, self._top_k, self._top_p = groups

    def __bool__(self) -> bool:
        """Whether any row has a filter."""
        return any((self._min_p, self._few_k, self._top_k, self._top_p))

    def _groups(self, upload: Uploader, *steps: Mapping[int, float]) -> list[_Group | None]:
        """For the parameter of each row that needs a step, by step; in one transfer."""
        some = [values for values in steps if values]
        arrays: list[npt.NDArray[Any]] = [np.array(list(each.values()))[:, None] for each in some]
        arrays += [np.array(list(each), np.int64) for each in some]
        sent = upload(*arrays) if arrays else []
        groups = [
            _Group(None if len(each) == self._count else rows, column, int(max(each.values())))
            for each, column, rows in zip(some, sent, sent[len(some) :], strict=False)
        ]
        return [groups.pop(0) if values else None for values in steps]

    def lowest(self, logits: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """The lowest logit that each row keeps.

        Args:
            logits: float32 ``[R, V]``, after temperature.
            probs: float32 ``[R, V]``, their softmax.

        Returns:
            float32 ``[R, 1]``; -inf in rows without a filter.
        """
        lowest = torch.full((self._count, 1), -math.inf, device=logits.device)
        if (group := self._min_p) is not None:
            peak = group.of(logits).amax(1, keepdim=True)
            group.put(lowest, (peak.double() + group.values).float())
        if (group := self._top_k) is not None:
            values = Largest(group.of(logits)).top(group.largest)[0]
            group.put(lowest, torch.maximum(group.of(lowest), values.gather(1, group.values - 1)))
        if (group := self._few_k) is not None and self._few_p is not None:
            ours, weights = group.of(logits), group.of(probs)
            values = Largest(ours).top(group.largest)[0]
            before = torch.maximum(group.of(lowest), values.gather(1, group.values - 1))
            target = _mass(ours, weights, before) * self._few_p.values
            group.put(lowest, _reach(values, before, weights, target)[0])
        if (group := self._top_p) is not None:
            ours, weights, before = group.of(logits), group.of(probs), group.of(lowest)
            target = _mass(ours, weights, before) * group.values
            group.put(lowest, _search(ours, before, weights, target))
        return lowest


def _mass(logits: torch.Tensor, probs: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    """float64 ``[r, 1]``: the probability of all tokens that are left, ties included."""
    mass = torch.empty_like(lowest)
    for piece in pieces(logits):
        some = logits[piece]
        kept = torch.ge(some, lowest[piece], out=torch.empty_like(some))
        mass[piece] = kept.mul_(probs[piece]).sum(1, keepdim=True)
    return mass.double()


def _search(
    logits: torch.Tensor, lowest: torch.Tensor, probs: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The lowest logit ``[r, 1]`` of the likeliest tokens that have the target probability."""
    vocabulary = logits.shape[1]
    if logits.is_cuda:  # to look whether that was enough would be a wait
        return _search_all(logits, lowest, probs, target)
    look = min(_FIRST_LOOK, vocabulary)
    found, enough = _reach(logits.topk(look, 1).values, lowest, probs, target)
    while look < vocabulary and not bool(enough.all()):
        look = min(look * _NEXT_LOOK, vocabulary)
        left = (~enough).nonzero()[:, 0]
        values = logits[left].topk(look, 1).values
        found[left], enough[left] = _reach(values, lowest[left], probs[left], target[left])
    return found


def _search_all(
    logits: torch.Tensor, lowest: torch.Tensor, probs: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The same among all tokens at once."""
    return _reach(logits.sort(1, descending=True).values, lowest, probs, target)[0]


def _reach(
    values: torch.Tensor, lowest: torch.Tensor, probs: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where descending logits ``[r, m]`` reach a probability.

    Returns:
        ``[r, 1]``, the last logit that is needed (the last given if they do not reach it), and
        bool ``[r]``, whether they do, or all that is left was given.
    """
    peak = probs.amax(1, keepdim=True).double()
    left = values >= lowest
    mass = (values.double() - values[:, :1].double()).exp_().mul_(peak).mul_(left)
    ends = mass.cumsum(1)
    needed = (left & (ends - mass < target)).sum(1, keepdim=True)
    found = values.gather(1, (needed - 1).clamp_min_(0))
    # A row of NaN compares false with everything; it is done, and told as bad.
    enough = ~left[:, -1:] | (ends[:, -1:] >= target)
    return found, enough.squeeze(1)
