"""A level's plot: SVG, the same bytes for the same results and the same matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.common import Json
from bench.levels.level import Level

WIDTH_IN, HEIGHT_IN = 7.0, 4.0


def write_plot(level: Level, results: Json, path: Path) -> bool:
    """Draws a level's results; False if there is nothing to draw.

    Raises:
        ModuleNotFoundError: no matplotlib; it is part of the extra "bench".
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without these an SVG has random identifiers, the time, and the machine's fonts.
    style: Any = {"svg.hashsalt": path.name, "svg.fonttype": "none"}
    with matplotlib.rc_context(style):
        figure = Figure((WIDTH_IN, HEIGHT_IN), layout="constrained")
        if not level.draw(figure, results):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return True
