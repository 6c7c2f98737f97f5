"""Long rows some at a time, so that what is computed of them is no second copy of everything."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Values that are worked on at once: what stays in a core's cache, or bounds a GPU's memory.
_CPU = 1 << 18
_CUDA = 1 << 24


def pieces(values: torch.Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of so many rows as those of ``values`` ``[R, V]``; None for R."""
    count, width = values.shape
    most = max(1, (_CUDA if values.is_cuda else _CPU) // max(width, 1))
    for first in range(0, count if rows is None else rows, most):
        yield slice(first, first + most)
