"""Timing of several ways to do the same, all of which take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.common import Clock, Pairs, summarize_pairs, wall_clock
from bench.device import device_clock
from bench.graph_clock import in_turn
from bench.graph_clock import repeated as several_times
from bench.layout_cells import Bench
from bench.levels.repeat import Repeated, repeated
from bench.problem import Attend

# One timing takes at least this long on a GPU, whose clock ticks every half microsecond.
_TIMING_S = 4e-4
_TICK_S = 5e-7
_FEWEST_ROUNDS = 2

Run = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How often things are timed.

    Args:
        rounds: turns of every side in a repeat; fewer where a round takes long, at least two.
        repeats: of the whole.
        seconds: for all of it, about.
    """

    rounds: int
    repeats: int
    seconds: float


def cpu_clock(function: Run) -> float:
    """Seconds of this process on a CPU: with one thread, what a machine to itself would take."""
    start = time.process_time()
    function()
    return time.process_time() - start


def runners(
    bench: Bench, sides: Mapping[str, Sequence[Attend]]
) -> tuple[dict[str, Run], Clock, str]:
    """What is timed of each side, by which clock, and the clock's name.

    On a GPU every side is a graph. If one of them cannot be captured, none is, and events stand
    around plain launches: those of the host count then, for all sides alike.
    """
    try:
        return {name: bench.runner(calls) for name, calls in sides.items()}, bench.clock, "graph"
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        return {name: in_turn(calls) for name, calls in sides.items()}, device_clock, "events"


def take_turns(
    runs: Mapping[str, Run], candidate: str, clock: Clock, effort: Effort, calls: int
) -> dict[str, Repeated]:
    """The time of every other side over that of the candidate, each timed next to it.

    In a round every other side has its turn, and the candidate one beside each of these; which of
    the two is first changes from round to round.

    Args:
        runs: by name of the side.
        candidate: one of these.
        clock: that times a run.
        effort: how often.
        calls: of a run; times are of one of them.
    """
    for run in runs.values():  # on a GPU the first replay uploads the graph
        run()
    once = {name: clock(run) for name, run in runs.items()}
    replays = 1
    if clock is not wall_clock:
        replays = max(1, math.ceil(_TIMING_S / max(min(once.values()), _TICK_S)))
    bases = [name for name in runs if name != candidate]
    round_s = replays * sum(once[name] + once[candidate] for name in bases)
    rounds = int(effort.seconds / (effort.repeats * max(round_s, 1e-9)))
    rounds = min(effort.rounds, max(_FEWEST_ROUNDS, rounds))
    timed = {name: several_times(run, replays) for name, run in runs.items()}
    found: dict[str, list[Pairs]] = {name: [] for name in bases}
    for _ in range(effort.repeats):
        for name, pairs in _repeat(timed, bases, candidate, clock, rounds).items():
            found[name].append(_each(pairs, calls * replays))
    return {name: repeated(pairs) for name, pairs in found.items()}


def _repeat(
    runs: Mapping[str, Run], bases: Sequence[str], candidate: str, clock: Clock, rounds: int
) -> dict[str, Pairs]:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in bases}
    for turn in range(rounds):
        for name in bases:
            if turn % 2:
                ours = clock(runs[candidate])
                theirs = clock(runs[name])
            else:
                theirs = clock(runs[name])
                ours = clock(runs[candidate])
            seconds[name].append((theirs, ours))
    return {name: summarize_pairs(*zip(*pairs, strict=True)) for name, pairs in seconds.items()}


def _each(pairs: Pairs, calls: int) -> Pairs:
    return replace(pairs, base_us=pairs.base_us / calls, candidate_us=pairs.candidate_us / calls)
