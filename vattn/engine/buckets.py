"""Which shapes of decode steps get a CUDA graph.

A graph has a fixed number of rows, and the attention kernel's split of long sequences over the GPU
is baked into it. So there is one for each number of rows and each order of length; a step takes the
smallest that it fits into. Where the rows alone fill the GPU nothing is split, and one length does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_SHORTEST = 1024
# Blocks of work per multiprocessor from which on FlashAttention 2 does not split a sequence: 0.8 of
# two waves, in num_splits_heuristic of its flash_api.cpp. FlashAttention 3 stops before that.
_FULL = 1.6
_LENGTH_FACTOR = 4


class Bucket(NamedTuple):
    """Decode steps of up to ``rows`` sequences of up to ``longest`` tokens."""

    rows: int
    longest: int


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows, ascending: steps of 8 to 64 and of 16 beyond, and the most there can be."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, max_num_seqs + 1, 16)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def full_rows(kv_heads: int, multiprocessors: int) -> int:
    """Rows that fill a GPU by themselves, if each is a block of work per KV head."""
    return math.ceil(_FULL * multiprocessors / kv_heads)


def length_buckets(max_model_len: int) -> tuple[int, ...]:
    """Longest sequences in tokens, ascending; the last is ``max_model_len``."""
    lengths, length = [], _SHORTEST
    while length < max_model_len:
        lengths.append(length)
        length *= _LENGTH_FACTOR
    return (*lengths, max_model_len)


class Buckets:
    """The product of numbers of rows and of lengths.

    Args:
        max_num_seqs: most rows.
        max_model_len: longest sequence in tokens.
        sizes: numbers of rows; None for :func:`capture_sizes`.
        full_rows: from so many rows on, the kernel does not split; None if that is not known.

    Raises:
        ValueError: sizes that are no numbers of rows up to ``max_num_seqs``.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        sizes: Sequence[int] | None = None,
        *,
        full_rows: int | None = None,
    ) -> None:
        if sizes is None:
            sizes = capture_sizes(max_num_seqs)
        elif not sizes or min(sizes) < 1 or max(sizes) > max_num_seqs:
            raise ValueError(
                f"capture sizes {sizes!r} must be one number or more, from 1 to "
                f"max_num_seqs={max_num_seqs}"
            )
        self.sizes = sorted(set(sizes))
        self.lengths = length_buckets(max_model_len)
        self._full_rows = full_rows

    def _lengths_of(self, rows: int) -> Sequence[int]:
        is_full = self._full_rows is not None and rows >= self._full_rows
        return self.lengths[-1:] if is_full else self.lengths

    def __len__(self) -> int:
        return sum(len(self._lengths_of(rows)) for rows in self.sizes)

    def __iter__(self) -> Iterator[Bucket]:
        """All of them, the largest first: what smaller ones need fits into memory of theirs."""
        for rows in reversed(self.sizes):
            for longest in reversed(self._lengths_of(rows)):
                yield Bucket(rows, longest)

    def find(self, rows: int, longest: int) -> Bucket | None:
        """The smallest for so many sequences; None if they are too many or too long.

        Args:
            rows: sequences, at least 1.
            longest: tokens of the longest, its new one included.
        """
        size = bisect.bisect_left(self.sizes, rows)
        if size == len(self.sizes):
            return None
        lengths = self._lengths_of(self.sizes[size])
        length = bisect.bisect_left(lengths, longest)
        return None if length == len(lengths) else Bucket(self.sizes[size], lengths[length])
