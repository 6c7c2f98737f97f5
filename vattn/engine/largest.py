"""The largest values of long rows, by way of the maxima of blocks.

To look for the k largest of tens of thousands of values, or for where the largest is, takes a CPU
several times as long as to read them. The maxima of small blocks take no longer than that; and the
k largest values of a row lie in the k blocks with the largest maxima, for a value in another block
is no larger than those k maxima. On a GPU the operators of torch are fast as they are.
"""

from __future__ import annotations

import torch

_BLOCK = 64
# Shorter rows are not worth the detour.
_LEAST = 32 * _BLOCK
# Beyond this part of a row its candidates are so many that a direct search is as fast.
_MOST_PART = 0.25


class Largest:
    """Answers what is largest in each row; blocks are looked at once, however often one asks.

    Args:
        values: float32 ``[R, V]``, contiguous; not written to while one asks.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        rows, width = values.shape
        self._has_blocks = width >= _LEAST and rows > 0 and not values.is_cuda
        self._whole = width - width % _BLOCK  # values in whole blocks; the rest is always looked at
        self._maxima: torch.Tensor | None = None

    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest value of each row, float32 ``[R]``, and the first place of it, int64 ``[R]``.

        A NaN counts as the largest; the place is some place in the row, then.
        """
        if not self._has_blocks:
            best, places = self._values.max(1)
            return best, places
        blocks = self._block_maxima().max(1, keepdim=True).indices
        candidates, where = self._candidates(blocks)
        best = candidates.amax(1, keepdim=True)
        at = (candidates == best).to(torch.uint8).argmax(1, keepdim=True)
        return best.squeeze(1), where(at).squeeze(1)

    def top(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest values, descending.

        Args:
            count: how many, at most V.

        Returns:
            float32 ``[R, count]`` and their places, int64 ``[R, count]``. Which of equal values are
            among them is open.
        """
        width = self._values.shape[1]
        if not self._has_blocks or count * _BLOCK > width * _MOST_PART:
            top = self._values.topk(count, 1) if count < width else _sorted(self._values)
            return top[0], top[1]
        blocks = self._block_maxima().topk(count, 1, sorted=False).indices
        candidates, where = self._candidates(blocks)
        top = candidates.topk(count, 1)
        return top.values, where(top.indices)

    def _block_maxima(self) -> torch.Tensor:
        if self._maxima is None:
            self._maxima = self._in_blocks().amax(-1)
        return self._maxima

    def _in_blocks(self) -> torch.Tensor:
        rows = len(self._values)
        return self._values[:, : self._whole].view(rows, self._whole // _BLOCK, _BLOCK)

    def _candidates(self, blocks: torch.Tensor) -> tuple[torch.Tensor, _Places]:
        """The values of some blocks ``[R, k]`` and those past the last whole block."""
        rows, count = blocks.shape
        if self._whole == self._values.shape[1]:
            per_row = self._whole // _BLOCK
            at = torch.arange(0, rows * per_row, per_row)[:, None] + blocks
            values = self._values.view(-1, _BLOCK).index_select(0, at.view(-1))
            return values.view(rows, count * _BLOCK), _Places(blocks, self._whole)
        index = blocks[:, :, None].expand(rows, count, _BLOCK)
        values = self._in_blocks().gather(1, index).view(rows, count * _BLOCK)
        rest = self._values[:, self._whole :]
        return torch.cat([values, rest], 1), _Places(blocks, self._whole)


class _Places:
    """Where candidates are in their rows."""

    def __init__(self, blocks: torch.Tensor, whole: int) -> None:
        self._blocks, self._whole = blocks, whole

    def __call__(self, at: torch.Tensor) -> torch.Tensor:
        """Of candidates ``[R, n]``, by their number."""
        count = self._blocks.shape[1]
        block = (at // _BLOCK).clamp_max_(count - 1)
        inside = self._blocks.gather(1, block).mul_(_BLOCK).add_(at % _BLOCK)
        beyond = at - (count * _BLOCK - self._whole)
        return torch.where(at < count * _BLOCK, inside, beyond)


def _sorted(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = values.sort(1, descending=True)
    return ordered.values, ordered.indices
