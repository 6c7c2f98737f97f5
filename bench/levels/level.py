"""What a level of the comparison is: settings, a measurement, and what its results look like.

A level measures into a :class:`bench.partial.Partial`, which is on disk as soon as something is
measured. Tables, targets and the plot are functions of these results alone, so that a report
renders committed files with the same code that printed them.
"""

from __future__ import annotations

import abc
import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bench.common import Json, Target
from bench.levels.table import Table
from bench.partial import Partial


@dataclass(frozen=True)
class Published:
    """A figure of somebody else, to stand beside ours. Measured on other hardware than ours.

    Args:
        what: it is of, in the words of our table.
        figure: as published, with its unit: ``"1.24x"``.
        source: paper or repository, with section, figure or table.
        setting: hardware, model, sizes.
    """

    what: str
    figure: str
    source: str
    setting: str


@dataclass(frozen=True)
class Preset:
    """Named settings that repeat a published experiment, or isolate a choice of ours.

    Args:
        help: one line.
        settings: replace a level's defaults: by device, ``"cpu"`` (scaled down) and ``"cuda"``.
        small: replace them further with ``--small``.
        published: what was measured elsewhere.
    """

    help: str
    settings: Mapping[str, Json]
    small: Json = field(default_factory=dict)
    published: tuple[Published, ...] = ()


class Level(abc.ABC):
    """One level: ``python -m bench <name>``.

    Attributes:
        name: of the command, its result file and its plot.
        summary: one line.
        rows: names of results of which one at least has to be there, or nothing was measured.
        defaults: of the arguments by device, at the full setting.
        small: what replaces them with ``--small``, which has to end in well under a minute.
        presets: named settings.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    rows: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Mapping[str, Json]]
    small: ClassVar[Json]
    presets: ClassVar[Mapping[str, Preset]] = {}

    @abc.abstractmethod
    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        """Adds those that only this level has; each defaults to None, see ``defaults``."""

    @abc.abstractmethod
    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        """Measures into ``out``, row by row; parts that may fail go into ``out.part``."""

    @abc.abstractmethod
    def tables(self, results: Json) -> list[Table]:
        """Of whatever has been measured."""

    def targets(self, settings: Json, results: Json) -> list[Target]:
        """Figures and the limits they have to keep; of small settings there are none."""
        del settings, results
        return []

    def draw(self, figure: Any, results: Json) -> bool:
        """Draws the results into a matplotlib figure; False if there is nothing to draw."""
        del figure, results
        return False


def published_table(published: Sequence[Json]) -> Table:
    """Figures of others, from a result's JSON."""
    return Table(
        "published, on other hardware",
        ["what", "figure", "setting", "source"],
        [[p["what"], p["figure"], p["setting"], p["source"]] for p in published],
    )


def absent_table(absent: Mapping[str, str]) -> Table:
    """Kernels and peers that could not be measured, and why."""
    return Table("absent", ["what", "why"], sorted(absent.items()))
