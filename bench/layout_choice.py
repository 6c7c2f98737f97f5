"""Which layout the measurements speak for: speed against waste."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from bench.common import Json, Target
from bench.layout_points import DECISIVE, LayoutChoice, Point

LEAST_SPEED = 0.98  # of the same kernel on ordinary tensors
LEAST_LIVE = 0.95  # token bytes / physical bytes on the trace
# Speeds closer than this are the same: repeated runs differ by as much.
TIE = 0.01

_Key = tuple[str, int, int, int]  # kernel, length, batch, queries


@dataclass(frozen=True)
class Speed:
    """Attention on virtual slots of one layout: ordinary time / virtual time."""

    choice: LayoutChoice
    live_share: float
    speed: float  # geometric mean over the cells that all compared layouts have
    worst: float  # of those
    speed_all: float  # geometric mean over all cells of the layout
    cells: int

    @property
    def meets(self) -> bool:
        return self.speed >= LEAST_SPEED and self.live_share >= LEAST_LIVE

    def as_json(self) -> Json:
        found = asdict(self)
        choice: Json = found.pop("choice")
        return choice | found | {"meets": self.meets}


def choice_of(row: Json) -> LayoutChoice:
    """The layout that a row of the results is about."""
    return LayoutChoice(row["order"], row["layers_per_region"], row["page_bytes"])


def compare(cells: Sequence[Json], layout_rows: Sequence[Json]) -> tuple[list[Speed], list[_Key]]:
    """The speed of every layout over the same kernels and points, and which these are.

    The decisive points if any was measured. A layout with less than half of the cells that the one
    with most has is not compared: it would leave too little in common.
    """
    decisive = [cell for cell in cells if _is_decisive(cell)]
    by: dict[LayoutChoice, dict[_Key, float]] = {}
    for cell in decisive or cells:
        by.setdefault(choice_of(cell), {})[_key(cell)] = cell["ratio"]
    most = max((len(found) for found in by.values()), default=0)
    by = {choice: found for choice, found in by.items() if 2 * len(found) >= most}
    common = sorted(set.intersection(*(set(found) for found in by.values()))) if by else []
    if not common:
        return [], []
    live = {choice_of(row): row["live_share"] for row in layout_rows}
    speeds = []
    for choice, found in by.items():
        ratios = [found[key] for key in common]
        everywhere = [c["ratio"] for c in cells if choice_of(c) == choice]
        speeds.append(
            Speed(
                choice=choice,
                live_share=live[choice],
                speed=_mean(ratios),
                worst=min(ratios),
                speed_all=_mean(everywhere),
                cells=len(everywhere),
            )
        )
    return speeds, common


def front(speeds: Sequence[Speed]) -> list[Speed]:
    """Those that no other beats in speed and in waste, the fastest first."""

    def beaten(one: Speed) -> bool:
        return any(
            other.speed >= one.speed
            and other.live_share >= one.live_share
            and (other.speed, other.live_share) != (one.speed, one.live_share)
            for other in speeds
        )

    return sorted((s for s in speeds if not beaten(s)), key=lambda s: -s.speed)


def best(speeds: Sequence[Speed]) -> tuple[Speed | None, str]:
    """The layout to take by default, and the reason.

    The fastest of those that waste little; the one that wastes least of those as fast.
    """
    if not speeds:
        return None, "nothing was measured"
    frugal = [s for s in speeds if s.live_share >= LEAST_LIVE]
    if not frugal:
        least = max(speeds, key=lambda s: s.live_share)
        return least, f"none has live / physical of {LEAST_LIVE}; this one wastes least"
    fastest = max(s.speed for s in frugal)
    found = max(
        (s for s in frugal if s.speed >= fastest - TIE), key=lambda s: (s.live_share, s.speed)
    )
    rule = f"the fastest (to {TIE}) with live / physical of at least {LEAST_LIVE}"
    return (
        found,
        rule if found.meets else f"{rule}; no such layout reaches a speed of {LEAST_SPEED}",
    )


def suggest(cells: Sequence[Json], layout_rows: Sequence[Json]) -> Json:
    """The default that the cells speak for, over all kernels and for each of them alone."""
    speeds, common = compare(cells, layout_rows)
    choice, reason = best(speeds)
    per_kernel = {}
    for label in dict.fromkeys(cell["kernel"] for cell in cells):
        alone, _ = compare([c for c in cells if c["kernel"] == label], layout_rows)
        found, _ = best(alone)
        per_kernel[label] = None if found is None else found.as_json()
    return {
        "choice": None if choice is None else choice.as_json(),
        "reason": reason,
        "front": [speed.as_json() for speed in front(speeds)],
        "layouts": [speed.as_json() for speed in sorted(speeds, key=lambda s: -s.speed)],
        "per_kernel": per_kernel,
        "compared": [
            dict(zip(("kernel", "length", "batch", "queries"), key, strict=True)) for key in common
        ],
    }


def targets(default: LayoutChoice, cells: Sequence[Json], live_share: float | None) -> list[Target]:
    """Of the layout that a cache of this device has by default."""
    ratios = [cell["ratio"] for cell in cells if choice_of(cell) == default]
    note = f"geometric mean of {len(ratios)}, worst {min(ratios):.3f}" if ratios else ""
    return [
        Target(
            f"attention on slots / on ordinary tensors, default layout ({default.name})",
            _mean(ratios) if ratios else None,
            LEAST_SPEED,
            "x",
            at_least=True,
            note=note,
        ),
        Target(
            "live / physical on the trace, default layout",
            live_share,
            LEAST_LIVE,
            "",
            at_least=True,
        ),
    ]


def _key(cell: Json) -> _Key:
    return (cell["kernel"], cell["length"], cell["batch"], cell["queries"])


def _is_decisive(cell: Json) -> bool:
    return Point(cell["length"], cell["batch"], cell["queries"]) in DECISIVE


def _mean(ratios: Iterable[float]) -> float:
    values = list(ratios)
    return math.exp(sum(map(math.log, values)) / len(values))
