"""The grid of the layout benchmark under a time limit, kept as it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.common import Budget, Json
from bench.kernels import Kernel, Prepare
from bench.layout_cells import FAILURES, Bench, Cell, fits
from bench.layout_points import LayoutChoice, Point

# Seconds between two writes of the results so far.
_WRITE_EVERY_S = 5.0


class DeviceLost(RuntimeError):
    """An error after which a CUDA context does nothing any more."""


class Grid:
    """Measures cells until time is up.

    Args:
        bench: what measures one.
        kernels: by how their calls are prepared.
        bandwidth: of the device, in bytes per second, for the floor.
        budget_s: seconds after which no cell is begun.
    """

    def __init__(
        self, bench: Bench, kernels: Mapping[Kernel, Prepare], bandwidth: float, budget_s: float
    ) -> None:
        self._bench = bench
        self._kernels = kernels
        self._bandwidth = bandwidth
        self._budget = Budget(budget_s)
        self._sound: dict[tuple[str, int | None], dict[Kernel, Prepare]] = {}
        self._written = time.monotonic()
        self.results: Json = {
            "cells": [],
            "memory": [],
            "relative_errors": [],
            "failed": [],
            "cut_for_time": self._budget.cut,
            "cut_for_memory": [],
            "seconds": 0.0,
        }

    def run(self, cells: list[tuple[LayoutChoice, Point]], keep: Any) -> Json:
        """All cells for which there is time and memory; what was left out is listed.

        Args:
            cells: in the order of their weight.
            keep: called with nothing every few seconds, to write what there is.
        """
        try:
            for choice, point in cells:
                self._cell(choice, point)
                self.results["seconds"] = self._budget.spent_s
                if time.monotonic() > self._written + _WRITE_EVERY_S:
                    keep()
                    self._written = time.monotonic()
        except DeviceLost as error:
            self.results["failed"].append({"why": f"stopped: {error}"})
        return self.results

    def _cell(self, choice: LayoutChoice, point: Point) -> None:
        name = f"{choice.name} {point.name}"
        if self._bench.needed_bytes(choice, point) > self._bench.max_bytes:
            self.results["cut_for_memory"].append(name)
            return
        if not self._budget.allows(name):
            return
        sound = self._checked(choice)
        if not sound:
            return
        what = asdict(choice) | asdict(point)
        try:
            cell = self._bench.measure(choice, point, sound)
        except FAILURES as error:
            self._fail(what, error)
            return
        finally:
            self._bench.tidy()
        self._add(what, point, cell)

    def _add(self, what: Json, point: Point, cell: Cell) -> None:
        read = point.batch * point.length * self._bench.model.token_bytes()
        self.results["memory"].append(what | cell.memory)
        rotation = self._bench.rotation(point)
        for kernel, pair in cell.pairs.items():
            self.results["cells"].append(
                what
                | {"kernel": kernel.label, "rotation": rotation}
                | asdict(pair)
                | {"floor_us": read / self._bandwidth * 1e6}
            )
        for kernel, why in cell.failed.items():
            self._fail(what | {"kernel": kernel.label}, why)

    def _checked(self, choice: LayoutChoice) -> dict[Kernel, Prepare]:
        """The kernels that agree with float32 on slots that lie so.

        Once per order and layers per region: a page size only moves the slots apart.
        """
        key = (choice.order, choice.layers_per_region)
        if key in self._sound:
            return self._sound[key]
        sound = self._sound[key] = {}
        for kernel, prepare in self._kernels.items():
            if not fits(kernel, choice):
                continue
            what = asdict(choice) | {"kernel": kernel.label}
            try:
                error = self._bench.verify(choice, kernel, prepare)
            except FAILURES as problem:
                self._fail(what, problem)
                continue
            sound[kernel] = prepare
            self.results["relative_errors"].append(what | {"relative_error": error})
        return sound

    def _fail(self, what: Json, why: BaseException | str) -> None:
        """Remembers it.

        Raises:
            DeviceLost: nothing after it can work.
        """
        text = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        self.results["failed"].append(what | {"why": text})
        if "CUDA error" in text and "out of memory" not in text:
            raise DeviceLost(text.splitlines()[0])
