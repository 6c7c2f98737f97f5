"""The grid of the layout benchmark: which layouts, which points, and in which order."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from bench.common import Json, short_bytes, short_count


@dataclass(frozen=True)
class Model:
    """The attention layers of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def as_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class LayoutChoice:
    """What is compared. ``layers_per_region`` None is all."""

    order: Literal["token", "head"]
    layers_per_region: int | None
    page_bytes: int

    @property
    def name(self) -> str:
        per_region = self.layers_per_region or "all"
        return f"{self.order} lpr={per_region} page={short_bytes(self.page_bytes)}"


@dataclass(frozen=True)
class Point:
    """What is attended to: ``batch`` sequences of ``length`` tokens, ``queries`` of them new."""

    length: int
    batch: int
    queries: int

    @property
    def name(self) -> str:
        chunk = f" q{self.queries}" if self.queries > 1 else ""
        return f"{self.batch}x{short_count(self.length)}{chunk}"


# What a layout is chosen by, the most telling first: enough tokens to be beyond every cache and
# most address caches, batches as engines run them, both ends of the length, and a prefill chunk.
DECISIVE = (
    Point(16384, 8, 1),
    Point(1024, 64, 1),
    Point(16384, 1, 512),
    Point(16384, 1, 1),
    Point(4096, 64, 1),
    Point(131072, 1, 1),
)


def layouts(args: argparse.Namespace) -> Iterator[LayoutChoice]:
    """Every layout, page size by page size."""
    for page, order in itertools.product(args.pages, args.orders):
        for per_region in args.layers_per_region:
            # In head order it only sets the number of reserved ranges.
            if order == "token" or per_region is None or len(args.layers_per_region) == 1:
                yield LayoutChoice(order, per_region, page)


def points(args: argparse.Namespace) -> list[Point]:
    """Decode at every length and batch; prefill chunks one sequence at a time."""
    return [
        Point(length, batch, queries)
        for queries in args.queries
        for length in args.lengths
        for batch in (args.batches if queries == 1 else args.batches[:1])
        if queries <= length
    ]


def decisive(found: Sequence[Point]) -> list[Point]:
    """Those of ``DECISIVE`` that are there, in its order; all points if none is."""
    return [point for point in DECISIVE if point in found] or list(found)


def cells(args: argparse.Namespace) -> list[tuple[LayoutChoice, Point]]:
    """The whole grid, so ordered that what a time limit cuts is what matters least.

    First the decisive points on every layout of the first page size, then on those of the others,
    then the other points in the same way. Within that one page size after the other, since pages
    made for one cell serve the next of their size, and within a page size point by point.
    """
    every, first = points(args), decisive(points(args))
    rest = [point for point in every if point not in first]
    out = []
    for part in (first, rest):
        for page in args.pages:
            same = [choice for choice in layouts(args) if choice.page_bytes == page]
            out += [(choice, point) for point in part for choice in same]
    return out
