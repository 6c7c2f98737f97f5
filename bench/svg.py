"""Figures as SVG: the same bytes for the same data, small enough to be kept with the sources."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STYLE = re.compile(r'style="([^"]*)"')
_INDENT = re.compile(r" *\n *")
# A tenth of a point is less than any screen shows of a plot this wide.
_DIGITS = re.compile(r"(\d\.\d)\d+")


@contextmanager
def style(path: Path) -> Iterator[None]:
    """What a figure is to be drawn and saved under: no random identifiers, no machine's fonts."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": path.name,
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],  # each text repeats the list
    }
    with matplotlib.rc_context(settings):
        yield


def save(figure: Any, path: Path) -> None:
    """Writes a figure without the time and without digits that nobody sees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    small = _DIGITS.sub(r"\1", text.getvalue())
    path.write_text(_with_classes(_INDENT.sub("\n", small)))


def _with_classes(text: str) -> str:
    """Each style that many elements repeat is written once, as a class."""
    counts = Counter(_STYLE.findall(text))
    names = {style: f"s{i}" for i, (style, n) in enumerate(counts.items()) if n > 1}

    def name(found: re.Match[str]) -> str:
        return f'class="{names[found[1]]}"' if found[1] in names else found[0]

    rules = "".join(f"\n.{name}{{{style}}}" for style, name in names.items())
    return _STYLE.sub(name, text).replace("</style>", f"{rules}\n</style>", 1)
