"""A level's plot: SVG, the same bytes for the same results and the same matplotlib."""

from __future__ import annotations

from pathlib import Path

from bench import svg
from bench.common import Json
from bench.levels.level import Level

WIDTH_IN, HEIGHT_IN = 7.0, 4.0


def write_plot(level: Level, results: Json, path: Path) -> bool:
    """Draws a level's results; False if there is nothing to draw.

    Raises:
        ModuleNotFoundError: no matplotlib; it is part of the extra "bench".
    """
    from matplotlib.figure import Figure

    with svg.style(path):
        figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
        if not level.draw(figure, results):
            return False
        svg.save(figure, path)
    return True
