"""What every benchmark shares: arguments, paired timing, plain tables, JSON with its provenance.

Standard library, NumPy and torch only, so that everything here also runs on a GPU machine that has
little else installed.

The JSON of every benchmark has the keys of :func:`report`: ``benchmark``, ``time``, ``versions``,
``commit``, ``machine``, ``command``, ``settings``, ``results`` and ``targets``.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.provenance import ROOT, git_commit, machine, versions
from bench.result_text import as_text
from vattn.config import format_bytes, parse_bytes

RESULTS = ROOT / "bench" / "results"

Json = dict[str, Any]
Clock = Callable[[Callable[[], object]], float]  # runs a function, returns its seconds


# Statistics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Two things timed alternately. ``ratio`` is base / candidate: above 1 the candidate wins.

    The median of the ratios of neighbours in time, not the ratio of medians: a machine whose speed
    drifts slows both of a pair alike.
    """

    pairs: int
    ratio: float
    ratio_low: float
    ratio_high: float
    base_us: float
    candidate_us: float


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def summarize_pairs(base_s: Sequence[float], candidate_s: Sequence[float]) -> Pairs:
    """Pair ``i`` is ``base_s[i]`` and ``candidate_s[i]``, measured one right after the other."""
    ratios = [b / c for b, c in zip(base_s, candidate_s, strict=True)]
    low, high = quartiles(ratios)
    return Pairs(
        pairs=len(ratios),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        base_us=statistics.median(base_s) * 1e6,
        candidate_us=statistics.median(candidate_s) * 1e6,
    )


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds of a call that is complete when it returns."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_pairs(
    base: Callable[[], object],
    candidate: Callable[[], object],
    *,
    pairs: int,
    warmup: int = 2,
    clock: Clock = wall_clock,
) -> Pairs:
    """Times two functions alternately, the first of a pair changing each time."""
    for _ in range(warmup):
        base()
        candidate()
    base_s: list[float] = []
    candidate_s: list[float] = []
    for i in range(pairs):
        if i % 2:
            candidate_s.append(clock(candidate))
            base_s.append(clock(base))
        else:
            base_s.append(clock(base))
            candidate_s.append(clock(candidate))
    return summarize_pairs(base_s, candidate_s)


class Budget:
    """A time limit that a grid of measurements keeps by leaving out its end, and says so."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.monotonic()
        self.cut: list[str] = []

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    def allows(self, what: str) -> bool:
        """Whether there is time for ``what``; what there is no time for is remembered."""
        if self.seconds is None or self.spent_s < self.seconds:
            return True
        self.cut.append(what)
        return False


# Targets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure and the limit it has to keep."""

    name: str
    measured: float | None
    limit: float
    unit: str
    at_least: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def as_json(self) -> Json:
        return asdict(self) | {"met": self.met}


def print_targets(targets: Iterable[Target]) -> None:
    rows = []
    for t in targets:
        sign = ">=" if t.at_least else "<="
        measured = "-" if t.measured is None else f"{t.measured:.3g} {t.unit}".strip()
        verdict = {True: "met", False: "MISSED", None: "not measured"}[t.met]
        rows.append([t.name, f"{sign} {t.limit:g} {t.unit}".strip(), measured, verdict, t.note])
    if rows:
        print_table("targets", ["what", "target", "measured", "", "note"], rows)


# Output -------------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; numbers are right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    width = [max([len(h), *(len(row[i]) for row in cells)]) for i, h in enumerate(header)]
    numeric = [
        bool(cells) and all(re.match(r"^[-+\d.]|^$", row[i]) for row in cells)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(w) if right else text.ljust(w)
            for text, w, right in zip(row, width, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    print(f"\n{title}")
    print(line(list(header)))
    print("  ".join("-" * w for w in width))
    for row in cells:
        print(line(row))
    sys.stdout.flush()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def report(
    benchmark: str, settings: Mapping[str, Any], results: Any, targets: Sequence[Target] = ()
) -> Json:
    """A benchmark's JSON document: where it comes from, what it found, what it should find.

    Files are given by name only: folders mean nothing on another machine.
    """
    return {
        "benchmark": benchmark,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "commit": git_commit(),
        "machine": machine(),
        "command": [Path(word).name if "/" in word else word for word in sys.argv],
        "settings": {key: _without_folder(value) for key, value in settings.items()},
        "results": results,
        "targets": [target.as_json() for target in targets],
    }


def _without_folder(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folder(each) for each in value]
    return value.name if isinstance(value, Path) else value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(document))
    print(f"wrote {path}")


# Arguments ----------------------------------------------------------------------------------------


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return made


def counts(text: str) -> list[int]:
    """``"1,8,64"`` or ``"1K,64K"``: positive integers, K is 1024."""
    try:
        values = [parse_bytes(re.sub(r"(?i)k$", "Ki", part)) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return values


def sizes(text: str) -> list[int]:
    """``"16KiB,2MiB"``: sizes in bytes."""
    try:
        return [parse_bytes(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def short_bytes(n: int) -> str:
    """``16K``, ``2M``: for table cells."""
    return format_bytes(n).replace(".0 ", "").replace(" ", "").replace("iB", "")


def short_count(n: int) -> str:
    """``64K`` for 65536, ``1000`` for 1000."""
    return f"{n // 1024}K" if n and n % 1024 == 0 else str(n)
