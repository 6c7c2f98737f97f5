"""What the kernel level measures: shapes of attention, points, and the order they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from bench.common import Json, short_count
from bench.layout_points import Model, Point

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class Shape:
    """Attention of a model on one device; half of the heads where two share it."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def heads_key(self) -> tuple[int, int, int]:
        """What a kernel sees of it."""
        return self.heads, self.kv_heads, self.head_dim

    @property
    def text(self) -> str:
        """``32/8/128``: heads, KV heads, head size."""
        return "/".join(map(str, self.heads_key))

    def model(self, dtype: torch.dtype) -> Model:
        return Model(self.layers, self.heads, self.kv_heads, self.head_dim, dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 32, 32, 8),
        Shape("yi-6b", 32, 32, 4),
        Shape("yi-34b", 60, 56, 8),
        Shape("qwen3-0.6b", 28, 16, 8),
        Shape("qwen3-8b", 36, 32, 8),
        Shape("qwen3-30b-a3b", 48, 32, 4),
        # As the vAttention paper ran them: tensor parallelism over two GPUs.
        Shape("llama-3-8b-tp2", 32, 16, 4),
        Shape("yi-34b-tp2", 60, 28, 4),
    )
}


@dataclass(frozen=True)
class Case:
    """One cell: what attends to how much, ``queries`` of each sequence's tokens being new."""

    phase: Phase
    shape: Shape
    batch: int
    context: int
    queries: int = 1

    @property
    def name(self) -> str:
        return f"{self.phase} {self.shape.name} {self.batch}x{short_count(self.context)}"

    @property
    def point(self) -> Point:
        return Point(self.context, self.batch, self.queries)

    def as_json(self) -> Json:
        return {
            "phase": self.phase,
            "shape": self.shape.name,
            "batch": self.batch,
            "context": self.context,
            "queries": self.queries,
        }


def distinct(names: Sequence[str]) -> list[Shape]:
    """The shapes by name; of those that a kernel cannot tell apart only the first.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    by_heads: dict[tuple[int, int, int], Shape] = {}
    for name in names:
        by_heads.setdefault(SHAPES[name].heads_key, SHAPES[name])
    return list(by_heads.values())


def shapes_json(names: Sequence[str]) -> list[Json]:
    """The measured shapes, each with the other asked-for models that have the same attention."""
    return [
        asdict(shape)
        | {
            "also": [
                name
                for name in names
                if name != shape.name and SHAPES[name].heads_key == shape.heads_key
            ]
        }
        for shape in distinct(names)
    ]


def cases(
    shapes: Sequence[Shape],
    phases: Sequence[Phase],
    batches: Sequence[int],
    contexts: Sequence[int],
    prompts: Sequence[int],
    chunk: int,
    wide: int,
) -> list[Case]:
    """The grid, so ordered that what a time limit cuts is what matters least.

    First one telling point of each phase for every shape, then all other points of the first
    ``wide`` shapes.

    Args:
        shapes: the most telling first.
        phases: of PHASES.
        batches: of decodes; the largest is the most telling.
        contexts: of decodes; the middle one is the most telling.
        prompts: of prefill, one request at a time; likewise.
        chunk: tokens at the end of a prompt that attend to all of it; 0 for the whole prompt.
        wide: shapes that are measured at every point.
    """

    def points(phase: Phase) -> list[tuple[int, int, int]]:
        """Batch, context, queries."""
        if phase == "decode":
            return [(batch, context, 1) for context in contexts for batch in batches]
        return [(1, prompt, min(chunk or prompt, prompt)) for prompt in prompts]

    def telling(phase: Phase) -> tuple[int, int, int]:
        tokens = sorted(contexts if phase == "decode" else prompts)
        middle = tokens[len(tokens) // 2]
        return max(point for point in points(phase) if point[1] == middle)

    first = [Case(phase, shape, *telling(phase)) for shape in shapes for phase in phases]
    rest = [
        Case(phase, shape, *point)
        for shape in shapes[:wide]
        for phase in phases
        for point in points(phase)
    ]
    return list(dict.fromkeys([*first, *rest]))
