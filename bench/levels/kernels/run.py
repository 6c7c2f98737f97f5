"""A run of the kernel level: case by case, under limits of time and memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bench.common import Json
from bench.device import copy_bandwidth, free_bytes
from bench.layout import DTYPES, default_choice
from bench.layout_cells import FAILURES
from bench.layout_grid import DeviceLost
from bench.layout_points import LayoutChoice
from bench.levels.kernels import tables as kernels_tables
from bench.levels.kernels.cells import Cells, CellTooLarge
from bench.levels.kernels.grid import Case, Shape, cases, distinct, shapes_json
from bench.levels.kernels.sides import Library, load_libraries
from bench.levels.kernels.time import Effort, cpu_clock
from bench.partial import Partial
from vattn.kv.cache import DEFAULT_TILES

_CPU_SCALE = (
    "On a CPU heads are those of the models and numbers are float32; contexts and batches are "
    "scaled down, and prefill is the last part of a prompt: a first part is attended to as it was "
    "computed, before it is in any cache, so there is nothing to compare."
)


class Run:
    """One run of the level, case by case; what belongs to a shape is made when its turn comes."""

    def __init__(self, args: argparse.Namespace, out: Partial) -> None:
        self._args = args
        self._out = out
        self._effort = Effort(args.rounds, args.repeats, args.cell_s)
        self._max_bytes = min(int(args.max_gib * 2**30), free_bytes(args.device))
        self._bandwidth = copy_bandwidth(args.device)
        self._shape: Shape | None = None
        self._cells: Cells
        self._layout: LayoutChoice
        self._libraries: list[tuple[Library, list[int]]] = []
        self._checked: dict[str, list[tuple[Library, list[int]]]] = {}

    def all(self) -> None:
        """Every case for which there are time and memory; what was left out is listed."""
        args, out = self._args, self._out
        shapes = distinct(args.shapes)
        out.set(
            copy_bandwidth_bytes_per_s=self._bandwidth,
            placement=args.placement,
            scale=_CPU_SCALE if args.device == "cpu" else "",
            shapes=shapes_json(args.shapes),
            rows=[],
        )
        points = (args.phases, args.batches, args.contexts, args.prompts, args.chunk)
        grid = cases(shapes, *points, args.wide)
        try:
            for case in grid:
                if args.budget.allows(case.name):
                    self._case(case)
        except DeviceLost as error:
            out.append("failed", {"part": "the rest", "why": f"stopped: {error}"})
        finally:
            self._leave()
            out.set(summary=kernels_tables.summarize(out.results["rows"]))

    # A shape --------------------------------------------------------------------------------------

    def _enter(self, shape: Shape) -> None:
        """Loads the libraries for a shape, and checks them where it is the first time."""
        if shape == self._shape:
            return
        self._leave()
        args = self._args
        model = shape.model(DTYPES[args.dtype])
        self._shape = shape
        self._layout = default_choice(args.device, model)
        tiles = DEFAULT_TILES[args.device]
        self._cells = Cells(args.device, model, tiles, 1, self._max_bytes)
        if args.clock == "cpu":
            self._cells.host_clock = cpu_clock
        self._out.set(layout=asdict(self._layout), last_level_cache_bytes=self._cells.cache_bytes)
        if shape.name not in self._checked:
            self._checked[shape.name] = self._sound(shape)
        self._libraries = self._checked[shape.name]

    def _leave(self) -> None:
        if self._shape is not None:
            self._cells.close()
            self._shape = None

    def _sound(self, shape: Shape) -> list[tuple[Library, list[int]]]:
        """Libraries and the block sizes of each that give what float32 gives."""
        args, found = self._args, []
        loaded, absent = load_libraries(args.device, self._cells.model, args.kernels or None)
        for name, reason in absent.items():
            self._absent(name, shape, reason)
        for library in loaded:
            sizes = library.block_sizes(args.blocks or None)
            if not sizes:
                self._absent(library.name, shape, f"takes none of the block sizes {args.blocks}")
                continue
            forms: Json = self._out.results.setdefault("forms", {})
            forms[library.name] = library.forms
            try:
                wrong = self._cells.verify_sides(self._layout, library, sizes)
            except FAILURES as error:
                self._fail(f"{library.name} {shape.name}, check", error)
                continue
            for side, why in wrong.items():
                self._fail(f"{library.name} {side} {shape.name}", why)
            if "virtual" not in wrong:
                sizes = [size for size in sizes if f"paged-{size}" not in wrong]
                found.append((library, sizes))
        return found

    def _absent(self, name: str, shape: Shape, reason: str) -> None:
        """The first shape speaks for all, unless a library is there for it and not for another."""
        absent: Json = self._out.results.setdefault("absent", {})
        if name in self._out.results.get("forms", {}):
            name = f"{name} for {shape.name}"
        absent.setdefault(name, reason)

    # A case ---------------------------------------------------------------------------------------

    def _case(self, case: Case) -> None:
        self._enter(case.shape)
        most = max((len(sizes) for _, sizes in self._libraries), default=0)
        if not most:
            return
        try:
            with self._cells.filled(self._layout, case, most) as filled:
                for library, sizes in self._libraries:
                    part = f"{library.name} {case.name}"
                    try:
                        found = self._cells.compare(
                            filled, library, sizes, self._args.placement, self._effort
                        )
                    except FAILURES as error:
                        self._fail(part, error)
                        continue
                    for side, why in found.pop("wrong", {}).items():
                        self._fail(f"{part} {side}", why)
                    self._out.append("rows", self._row(case, library, found))
                    self._cells.tidy()
        except DeviceLost:
            raise
        except CellTooLarge as error:
            self._out.append("cut_for_memory", {"cell": case.name, "why": str(error)})
        except FAILURES as error:
            self._fail(case.name, error)
        finally:
            self._cells.tidy()

    def _row(self, case: Case, library: Library, found: Json) -> Json:
        read = case.batch * case.context * self._cells.model.token_bytes()
        floor_us = float(f"{read / self._bandwidth * 1e6:.4g}")
        return {
            "kernel": library.name,
            **case.as_json(),
            "layers": self._cells.rotation(case.point),
            "bytes": read,
            "floor_us": floor_us if case.phase == "decode" else None,
            **found,
        }

    def _fail(self, part: str, why: BaseException | str) -> None:
        """Remembers it.

        Raises:
            DeviceLost: nothing after it can work.
        """
        text = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        self._out.append("failed", {"part": part, "why": text})
        if "CUDA error" in text and "out of memory" not in text:
            raise DeviceLost(text.splitlines()[0])
