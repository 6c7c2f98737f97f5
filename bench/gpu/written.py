"""What a stage wrote and printed: measurements, targets, tests. Of a stage that was ended too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.child import TIMEOUT_CODE, Ended
from bench.gpu.stages import Stage


def judge(stage: Stage, ended: Ended, found: Any, rehearse: bool) -> tuple[str, list[str]]:
    """The status of a stage that was run, and what there is to say about it."""
    status = "passed" if ended.code == 0 else "failed"
    if ended.code == TIMEOUT_CODE or ended.at_limit:
        status = "timeout"
    status = "cut" if ended.cut else status
    notes = [f"exit code {ended.code}"] if status == "failed" else []
    if stage.tests:
        counted = count_tests(ended.log)
        if status == "passed" and " passed" not in counted and not rehearse:
            return "failed", ["no test passed", counted]  # and so nothing was shown
        return status, [*notes, counted]
    if "{json}" in stage.command and status == "passed" and found is None and not rehearse:
        # It says why it measured nothing, or it is wrong.
        last = (ended.log.strip().splitlines() or [""])[-1]
        if last.startswith("skipped: "):
            return "skipped", [last.removeprefix("skipped: ")]
        return "failed", ["it wrote no result"]
    parts = failed_parts(found)
    if stage.rows and not measured(found, stage.rows):
        notes.append("measured nothing")
        status = "failed" if status == "passed" and not rehearse else status
    elif parts and ended.code == 1 and status == "failed":
        status, notes = "partial", []
    notes += [f"failed: {_first(parts)}"] if parts else []
    return status, notes + describe_targets(found) + describe_cuts(found)


def read_results(path: Path) -> Any:
    """What a benchmark wrote, also one that was ended before it was done; None for nothing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def count_tests(log: str) -> str:
    """Of ``pytest -v``, also of a run that was cut short."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)", log, re.MULTILINE)
    counted = {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return ", ".join(f"{n} {word.lower()}" for word, n in counted.items() if n) or "no test ran"


def measured(results: Any, rows: Sequence[str]) -> bool:
    """Whether a benchmark's document has a measurement under any of these names."""
    found = _of(results, "results")
    return isinstance(found, Mapping) and any(found.get(name) for name in rows)


def failed_parts(results: Any) -> list[str]:
    """The parts of a benchmark that failed, by name, or why where they have none."""
    found = _of(_of(results, "results"), "failed") or ()
    return [str(part.get("part") or part.get("why")) for part in found if isinstance(part, Mapping)]


def describe_cuts(results: Any) -> list[str]:
    """What a benchmark had no time for."""
    found = _of(results, "results")
    cut = list(_of(found, "cut_for_time") or _of(found, "cut") or ())
    return [f"no time for {_first(cut)}"] if cut else []


def targets_of(results: Any) -> list[Mapping[str, Any]]:
    """The figures that have a limit."""
    return list(_of(results, "targets") or ())


def describe_targets(results: Any) -> list[str]:
    """How many were met, of those that were measured."""
    known = [target for target in targets_of(results) if target["met"] is not None]
    if not known:
        return []
    met = sum(target["met"] for target in known)
    return [f"{met} of {len(known)} targets met"]


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _first(names: Sequence[Any]) -> str:
    """The first few."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(map(str, names[:3])) + more
