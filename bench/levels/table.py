"""Tables that are printed by a run and rendered as Markdown from its saved results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.common import print_table


@dataclass(frozen=True)
class Table:
    """A title, a header and rows; ``note`` is a sentence beneath it.

    Cells are text, numbers, or None for what was not measured.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.title}: the row {row} has not {len(self.header)} cells")

    def print(self) -> None:
        """To the terminal."""
        print_table(self.title, self.header, self.rows)
        if self.note:
            print(self.note)

    def markdown(self) -> str:
        """With the title as bold text above it."""
        lines = [f"**{self.title}**", "", _line(self.header), _line(["---"] * len(self.header))]
        lines += [_line([_cell(value) for value in row]) for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
