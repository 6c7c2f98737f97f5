"""Bytes that a layout takes beyond the tokens: page tails and tile cover, for given lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import Json
from bench.trace import Lengths, draw_trace, read_trace
from vattn.kv.layout import Region


@dataclass(frozen=True)
class Footprint:
    """Physical bytes of one set of sequences, as ``KVCache.stats()`` counts them."""

    token_bytes: int
    live_bytes: int
    cover_bytes: int

    @property
    def live_share(self) -> float:
        """Token bytes / physical bytes, cover apart."""
        return self.token_bytes / self.live_bytes

    @property
    def cover_share(self) -> float:
        """Cover / physical bytes without it."""
        return self.cover_bytes / self.live_bytes

    @property
    def tail_bytes(self) -> int:
        return self.live_bytes - self.token_bytes

    def as_json(self) -> Json:
        return {
            "token_bytes": self.token_bytes,
            "live_bytes": self.live_bytes,
            "cover_bytes": self.cover_bytes,
            "tail_bytes": self.tail_bytes,
            "live_share": self.live_share,
            "cover_share": self.cover_share,
        }


def footprint(
    regions: Sequence[Region], page_bytes: int, tiles: Sequence[int], lengths: Lengths
) -> Footprint:
    """What sequences of these lengths take, each in a slot of its own."""
    covered_tokens = np.max([-(-lengths // tile) * tile for tile in tiles], axis=0)
    tokens = live = covered = 0
    for region in regions:
        tokens += region.runs * int(np.sum(lengths * region.token_bytes))
        live += region.runs * _whole_pages(lengths * region.token_bytes, page_bytes)
        covered += region.runs * _whole_pages(covered_tokens * region.token_bytes, page_bytes)
    return Footprint(tokens, live, covered - live)


def _whole_pages(sizes: Lengths, page_bytes: int) -> int:
    return int(np.sum(-(-sizes // page_bytes))) * page_bytes


def pages_each(
    regions: Sequence[Region], page_bytes: int, tiles: Sequence[int], lengths: Lengths
) -> Lengths:
    """Pages of each sequence, cover among them: what its admission asks of the pool."""
    tokens = np.max([-(-lengths // tile) * tile for tile in tiles], axis=0)
    pages = np.zeros_like(lengths)
    for region in regions:
        pages += region.runs * -(-(tokens * region.token_bytes) // page_bytes)
    return pages


def read_lengths(path: Path) -> Lengths:
    """Final lengths, context plus generated tokens, of a trace; see :func:`read_trace`."""
    return read_trace(path).total


def draw_lengths(requests: int = 4000, seed: int = 0) -> Lengths:
    """Final lengths of a drawn trace; see :func:`draw_trace`."""
    return draw_trace(requests, seed).total
