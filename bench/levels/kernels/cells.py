"""One cell of the kernel level: the same tokens in slots, in ordinary tensors and in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bench.common import Clock, Json, wall_clock
from bench.kernels import Kernel, Prepare
from bench.layout_cells import FAILURES, Bench
from bench.layout_fill import TOLERANCE, fill, relative_error
from bench.layout_points import LayoutChoice, Point
from bench.levels.kernels.blocks import KV, SHUFFLED, make_blocks, on_blocks
from bench.levels.kernels.grid import Case, Phase
from bench.levels.kernels.sides import Library
from bench.levels.kernels.time import Effort, runners, take_turns
from bench.problem import Attend, Problem, reference

VIRTUAL, ORDINARY = "virtual", "ordinary"
# Queries of a prompt at its beginning, in the middle and at its end that float32 is asked about.
_SAMPLE = 16
# More than the check before the cells takes, whatever a cell may take.
_CHECK_BYTES = 2 << 30


class CellTooLarge(MemoryError):
    """A cell needs more memory than it may take."""


@dataclass(frozen=True)
class Filled:
    """A cell's K and V on both contiguous sides."""

    case: Case
    problem: Problem
    virtual: list[KV]
    ordinary: list[KV]


class Cells(Bench):
    """Measures cells of one shape; see :class:`bench.layout_cells.Bench`.

    Attributes:
        host_clock: for a CPU.
    """

    host_clock: Clock = staticmethod(wall_clock)

    @property
    def clock(self) -> Clock:
        """For what :meth:`runner` makes."""
        return self.host_clock if self.device == "cpu" else super().clock

    def rotation(self, point: Point) -> int:
        """Layers to go round so that decodes find none in the last-level cache.

        Of prefill few will do: it computes longer than it reads, and of a whole prompt K and V have
        just been written when it attends to them.
        """
        if point.queries == point.length:
            return 1
        layers = super().rotation(point)
        return layers if point.queries == 1 else min(layers, 2)

    def cell_bytes(self, choice: LayoutChoice, point: Point, block_sizes: int) -> int:
        """Of slots, ordinary tensors, and blocks of so many sizes."""
        blocks = block_sizes * self.rotation(point) * self.layer_bytes(point)
        return self.needed_bytes(choice, point) + int(1.1 * blocks)

    @contextmanager
    def filled(self, choice: LayoutChoice, case: Case, block_sizes: int) -> Iterator[Filled]:
        """The cell's slots and ordinary tensors, random and equal.

        Raises:
            CellTooLarge: with blocks of so many sizes beside them they do not fit.
        """
        point = case.point
        needed = self.cell_bytes(choice, point, block_sizes)
        if needed > self.max_bytes:
            raise CellTooLarge(f"{case.name} needs {needed} bytes, and may take {self.max_bytes}")
        pool = self.pool(choice.page_bytes)
        rotation = self.rotation(point)
        beside = (1 + block_sizes) * rotation * self.layer_bytes(point)
        if pool.stats().created_bytes + beside > self.max_bytes:
            pool.trim()  # a larger cell before left pages where the other sides have to go
        lengths = [point.length] * point.batch
        with self.open(choice, point) as cache:
            slots = np.array([int(cache.open()) for _ in lengths], np.int32)
            cache.ensure_many(slots, np.array(lengths, np.int32))
            virtual = [cache.layer(layer) for layer in range(rotation)]
            for layer, (k, v) in enumerate(virtual):
                fill(cache, layer, lengths, k, v)
            ordinary = [
                (self.ordinary(k, point.length), self.ordinary(v, point.length)) for k, v in virtual
            ]
            q = self.queries(point.batch, point.queries)
            order = self.slot_order(slots.tolist())
            yield Filled(case, Problem(q, order, lengths), virtual, ordinary)

    def slot_order(self, slots: list[int]) -> list[int]:
        """Shuffled; SDPA, on a CPU, needs neighbours side by side, and engines sort them so."""
        if self.device != "cpu":
            self._random.shuffle(slots)
        return slots

    # Sides ----------------------------------------------------------------------------------------

    def compare(
        self,
        filled: Filled,
        library: Library,
        block_sizes: Sequence[int],
        placement: str,
        effort: Effort,
    ) -> Json:
        """All sides of a library, checked and then timed.

        Returns:
            ``clock``, ``virtual_us``, ``ordinary`` and, by block size, ``paged``: ratios over
            virtual slots, as :class:`bench.levels.repeat.Repeated` has them; ``wrong``: sides that
            were not timed because their result is wrong, and why.

        Raises:
            AssertionError: the result on virtual slots is wrong.
        """
        sides = self._sides(filled, library, block_sizes, placement)
        wrong = self._wrong(filled, sides)
        if VIRTUAL in wrong:
            raise AssertionError(wrong[VIRTUAL])
        sound = {name: calls for name, calls in sides.items() if name not in wrong}
        runs, clock, how = runners(self, sound)
        found = take_turns(runs, VIRTUAL, clock, effort, len(filled.virtual))
        ratios = {name: _short(ratio.as_json()) for name, ratio in found.items()}
        row: Json = {"wrong": wrong} if wrong else {}
        return row | {
            "clock": "host" if self.device == "cpu" else how,
            "virtual_us": next((ratio["candidate_us"] for ratio in ratios.values()), None),
            "ordinary": ratios.pop(ORDINARY, None),
            "paged": {name.removeprefix("paged-"): ratio for name, ratio in ratios.items()},
        }

    def _sides(
        self, filled: Filled, library: Library, block_sizes: Sequence[int], placement: str
    ) -> dict[str, list[Attend]]:
        contiguous = library.contiguous[filled.case.phase]
        sides = {
            VIRTUAL: contiguous(filled.problem, filled.virtual),
            ORDINARY: contiguous(filled.problem, filled.ordinary),
        }
        for size in block_sizes:
            kernel = library.fresh()
            blocks = make_blocks(kernel, size, filled.problem, filled.virtual, placement=placement)
            sides[f"paged-{size}"] = on_blocks(kernel, blocks.table, size)(
                filled.problem, blocks.layers
            )
        return sides

    def _wrong(self, filled: Filled, sides: Mapping[str, Sequence[Attend]]) -> dict[str, str]:
        """Sides whose result is not what float32 says, or not on every layer what slots give."""
        limit = TOLERANCE[self.model.dtype]
        truths = [
            (layer, rows, out)
            for layer in sorted({0, len(filled.virtual) - 1})
            for rows, out in sampled(filled.problem, *filled.virtual[layer])
        ]
        ours = [call().float() for call in sides[VIRTUAL]]
        wrong = {}
        for name, calls in sides.items():
            outs = ours if name == VIRTUAL else [call() for call in calls]
            errors = [relative_error(outs[layer][:, rows], out) for layer, rows, out in truths]
            errors += [relative_error(a, b) for a, b in zip(outs, ours, strict=True)]
            worst = max(errors, key=lambda error: (error != error, error))
            if not worst < limit:
                wrong[name] = f"relative error {worst:.2g}, above {limit:g}"
        return wrong

    # Before the cells -----------------------------------------------------------------------------

    def verify_sides(
        self, choice: LayoutChoice, library: Library, block_sizes: Sequence[int]
    ) -> dict[str, str]:
        """Runs every side on ragged sequences, NaN wherever it must not read.

        Returns:
            Of sides that fail, or whose result is not that of float32: name and why.
        """
        few = replace(self.model, layers=choice.layers_per_region or 2)
        small = Cells(self.device, few, self.tiles, 1, max(self.max_bytes, _CHECK_BYTES))
        ways: dict[str, Prepare] = {VIRTUAL: _on_slots(library)}
        ways |= {f"paged-{size}": _on_fresh_blocks(library, size) for size in block_sizes}
        wrong = {}
        for name, prepare in ways.items():
            try:
                small.verify(choice, _named(library.name, name, self.device, prepare), prepare)
            except FAILURES as error:
                wrong[name] = f"{type(error).__name__}: {error}"
        small.close()
        return wrong


def _named(library: str, side: str, device: str, prepare: Prepare) -> Kernel:
    return Kernel(library, side, device, (), lambda: prepare)


def _on_slots(library: Library) -> Prepare:
    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        return library.contiguous[_phase(problem)](problem, [(k, v)])[0]

    return prepare


def _on_fresh_blocks(library: Library, block_tokens: int) -> Prepare:
    def prepare(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> Attend:
        kernel = library.fresh()
        blocks = make_blocks(
            kernel,
            block_tokens,
            problem,
            [(k, v)],
            placement=SHUFFLED,
            spare=7,
            unread=float("nan"),
        )
        return on_blocks(kernel, blocks.table, block_tokens)(problem, blocks.layers)[0]

    return prepare


def _phase(problem: Problem) -> Phase:
    return "decode" if problem.queries == 1 else "prefill"


def sampled(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Some queries, and what they should give by float32: all of a decode, three stretches else."""
    n = problem.queries
    if n <= 3 * _SAMPLE:
        return [(slice(0, n), reference(problem, k, v))]
    found = []
    for first in (0, n // 2, n - _SAMPLE):
        rows = slice(first, first + _SAMPLE)
        seen = [length - n + rows.stop for length in problem.lengths]
        part = Problem(problem.q[:, rows], problem.slots, seen)
        found.append((rows, reference(part, k, v)))
    return found


def _short(value: Any) -> Any:
    """Floats to four digits: files are read by people."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value
