"""Result files of gpu-check: taken over from a run, and read back for the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import Json, write_json
from bench.gpu.stages import STAGES
from bench.gpu.written import failed_parts, measured

ORDER = [stage.name for stage in STAGES]
_ROWS = {stage.name: stage.rows for stage in STAGES}
# Of a benchmark of several parts, what it had measured before one failed or its time was over.
_INCOMPLETE = ("partial", "timeout")
# What a part gives that has neither its name nor rows of its own.
_GIVEN_BY = {("mapping", "steps"): ("ways", "live_bytes")}

# Of results/<gpu>/<stage>.json; what is published leaves out what a run printed.
_PUBLISHED = (
    *("stage", "status", "note", "seconds", "limit_s", "command", "time", "versions", "commit"),
    *("machine", "attention_backends", "results"),
)
# An absolute path of more than one part, inside any text.
_PATH = re.compile(r"(?<![\w.:/])(?:/[\w.@+~-]+)+/([\w.@+~-]*)")


@dataclass(frozen=True)
class StageFile:
    """A published result of one stage on one GPU: that passed, or what it has of figures."""

    path: str  # from the root of the repository
    folder: str  # of the GPU: "nvidia-h200"
    document: Json

    @property
    def stage(self) -> str:
        return str(self.document["stage"])

    @property
    def gpu(self) -> str:
        """The device's name; the folder's where none was recorded."""
        found = self.document.get("machine", {}).get("gpu", {})
        return str(found.get("name", self.folder))

    @property
    def commit(self) -> str:
        """Seven digits of it, and "-dirty" if it was."""
        commit = str(self.document.get("commit", "unknown"))
        return re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", commit)

    @property
    def command(self) -> str:
        return f"python -m bench.gpu.check --only {self.stage}"

    @property
    def source(self) -> str:
        """Where a figure comes from, as Markdown."""
        link = f"[{self.path.rsplit('/', 1)[-1]}]({self.path})"
        said = "" if self.status == "passed" else f", **{self.status}**"
        return f"{link}, {self.gpu}, {self.commit}, `{self.command}`{said}"

    @property
    def status(self) -> str:
        """What the stage ended as: "passed", "partial" or "timeout"."""
        return str(self.document["status"])

    @property
    def benchmark(self) -> Json:
        """The document of the stage's benchmark; {} of a stage that runs tests."""
        found = self.document.get("results")
        return found if isinstance(found, dict) else {}

    @property
    def results(self) -> Json:
        """What its benchmark measured."""
        found = self.benchmark.get("results")
        return found if isinstance(found, dict) else {}

    def rows(self, stage: str, name: str, *keys: str) -> list[Json]:
        """The rows of a list in the results of that stage that have all the keys; [] of others."""
        found = self.results.get(name) if self.stage == stage else None
        return [row for row in found or () if isinstance(row, dict) and set(keys) <= set(row)]


def gpu_folders(results: Path) -> list[Path]:
    """The folders of results that are of GPUs, by name."""
    return sorted(p for p in results.glob("*") if p.is_dir() and p.name != "cpu")


def publishable(document: Json) -> Json | None:
    """A stage's file without the figures of parts that failed; None if it has nothing to show.

    A stage that passed is shown as it is; one of tests that did not has nothing.
    """
    if document["status"] == "passed":
        return document
    if document["status"] not in _INCOMPLETE:
        return None
    whole = document["results"]
    if not isinstance(whole, Mapping) or not isinstance(whole.get("results"), Mapping):
        return None
    stage = document["stage"]
    kept = without(stage, whole["results"], failed_parts(whole))
    shown = {**whole, "results": kept}
    if kept != whole["results"]:
        shown["targets"] = []  # they may be of what is gone
    return {**document, "results": shown} if measured(shown, _ROWS[stage]) else None


def without(stage: str, results: Mapping[str, Any], parts: Sequence[str]) -> Json:
    """Results without those of some parts: whole entries, and rows of lists by what they are of."""
    gone = {*parts, *(name for part in parts for name in _GIVEN_BY.get((stage, part), ()))}
    return {
        name: [row for row in value if not _parts_of(name, row) & gone]
        if isinstance(value, list)
        else value
        for name, value in results.items()
        if name == "failed" or name not in gone
    }


def _parts_of(name: str, row: Any) -> set[str]:
    """What bench.decode and bench.prefill may call the part that measured a row."""
    if not isinstance(row, Mapping) or "mode" not in row:
        return set()
    point = f"{row.get('batch')}x{row.get('context')}"
    return {f"{name} {row['mode']} {point}", f"{row['mode']} {row.get('tokens')}"}


def load(folder: Path, root: Path) -> list[StageFile]:
    """The stages of a GPU that have something to show, in their order.

    Raises:
        ValueError: a file that no stage of gpu-check wrote, or of a rehearsal.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        name = path.relative_to(root).as_posix()
        stage = document.get("stage") if isinstance(document, dict) else None
        if stage not in ORDER or stage != path.stem:
            raise ValueError(
                f"{name} is not the result of a stage of gpu-check; put results there with "
                "python -m bench.report --collect DIR"
            )
        if document.get("rehearsal"):
            raise ValueError(f"{name} is of a rehearsal on a CPU; remove it")
        shown = publishable(document)
        if shown is not None:
            found.append(StageFile(name, folder.name, shown))
    return sorted(found, key=lambda file: ORDER.index(file.stage))


def collect(source: Path, results: Path) -> list[Path]:
    """Copies what can be shown to ``results/<gpu>/``, without logs and paths of the machine.

    Args:
        source: of a run of gpu-check: its name is the GPU's.
        results: ``bench/results``.

    Returns:
        What was written.

    Raises:
        ValueError: nothing there passed or has figures, or it is of a rehearsal.
    """
    taken = []
    for path in sorted(source.glob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("stage") not in ORDER:
            raise ValueError(f"{path} is not the result of a stage of gpu-check")
        if document.get("rehearsal"):
            raise ValueError(f"{path} is of a rehearsal on a CPU: no measurement")
        shown = publishable(document)
        status = document["status"]
        if shown is None:
            print(f"left out: {document['stage']}, which is {status} and has no figure")
            continue
        if status != "passed":
            print(f"not complete: {document['stage']}, which is {status}: {document['note']}")
        taken.append(shown)
    if not taken:
        raise ValueError(f"{source} has no stage that passed or has figures; give results/<gpu>")
    written = []
    for document in taken:
        target = results / _slug(document, source) / f"{document['stage']}.json"
        write_json(target, scrub({key: document[key] for key in _PUBLISHED}))
        written.append(target)
    return written


def _slug(document: Mapping[str, Any], source: Path) -> str:
    name = document["machine"].get("gpu", {}).get("name")
    if name is None:
        return source.resolve().name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def scrub(value: Any) -> Any:
    """The same without folders of the machine: of absolute paths only the last part is left."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[1] or found[0].rstrip("/").rsplit("/", 1)[-1], value)
    if isinstance(value, Mapping):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return value


def between(text: str, markers: tuple[str, str], inner: str, name: str) -> str:
    """A document with something else between its two markers, each of which is a line.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    begin, end = markers
    counts = (text.count(begin), text.count(end))
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"{name} needs the lines {begin} and {end}, once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{inner}{end}{rest.split(end)[1]}"
