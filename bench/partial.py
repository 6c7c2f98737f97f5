"""Results that are on disk as soon as they are measured, so that a run cut short leaves them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.common import Json, Target, print_targets, report
from bench.result_text import as_text


class Partial:
    """The JSON document of a benchmark, written anew whenever something is added.

    Args:
        path: of the file; None to write none.
        benchmark: its name.
        settings: as for :func:`bench.common.report`.
        targets: of the results so far.
    """

    def __init__(
        self,
        path: Path | None,
        benchmark: str,
        settings: Mapping[str, Any],
        targets: Callable[[Json], Sequence[Target]],
    ) -> None:
        self.results: Json = {}
        self._path = path
        self._targets = targets
        # Once: it asks git and nvidia-smi, and what they say is of the beginning of the run.
        self._document = report(benchmark, settings, self.results)

    @property
    def targets(self) -> list[Target]:
        """Of the results so far."""
        return list(self._targets(self.results))

    def set(self, **results: Any) -> None:
        """Adds or replaces results by name."""
        self.results.update(results)
        self.write()

    def append(self, name: str, row: Json) -> None:
        """Adds a row to the list of that name."""
        self.results.setdefault(name, []).append(row)
        self.write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that may fail: the error is among the results, and the run goes on.

        Whatever the error is: another version of a library raises what nobody expects, and the
        other parts are not to be lost to it.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.append("failed", {"part": name, "why": f"{type(error).__name__}: {error}"})

    @property
    def failed(self) -> bool:
        """Whether a part has failed."""
        return "failed" in self.results

    def write(self) -> None:
        """Replaces the file as a whole: who kills the run finds the one before or this one."""
        self._document["targets"] = [target.as_json() for target in self.targets]
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}.part")
        beside.write_text(as_text(self._document))
        beside.replace(self._path)

    def end(self, rows: Sequence[str] = ()) -> int:
        """Prints the targets, what failed, and where the results are.

        Args:
            rows: names of results of which one at least has to be there; none: no such demand.

        Returns:
            The exit code: 1 if something failed, or nothing was measured.
        """
        print_targets(self.targets)
        for failure in self.results.get("failed", ()):
            print(f"FAILED {failure['part']}: {failure['why']}")
        empty = bool(rows) and not any(self.results.get(name) for name in rows)
        if empty:
            print(f"error: nothing was measured; {self._why_nothing()}")
        if self._path is not None:
            print(f"wrote {self._path}")
        return int(self.failed or empty)

    def _why_nothing(self) -> str:
        why = [
            f"{name}: {reason}" for name, reason in self.results.get("refused_modes", {}).items()
        ]
        why += [f"{failure['part']} failed" for failure in self.results.get("failed", ())]
        if cut := self.results.get("cut_for_time"):
            why.append(f"cut: no time for {', '.join(cut)}; give a larger --budget-s")
        return "; ".join(why) or "nothing was asked for"
