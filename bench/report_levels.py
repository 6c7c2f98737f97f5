"""The tables and plots of the levels in docs/levels.md, from committed results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import Json
from bench.levels import registry
from bench.levels.level import absent_table, published_table
from bench.levels.plot import write_plot
from bench.levels.table import Table
from bench.report_files import between, gpu_folders, load

BEGIN, END = "<!-- levels:begin -->", "<!-- levels:end -->"
DOCUMENT = Path("docs") / "levels.md"
IMAGES = Path("docs") / "images"
UNMEASURED = "Nothing is measured yet; `python -m bench LEVEL --json FILE` measures it.\n"
STAGE = "level-"  # with which the names of their stages in gpu-check begin


@dataclass(frozen=True)
class LevelFile:
    """A committed result of one level on one device."""

    path: str  # from the root of the repository
    device: str  # "cpu", "nvidia-h200"
    document: Json
    status: str = "passed"

    @property
    def level(self) -> str:
        return str(self.document["benchmark"])

    @property
    def preset(self) -> str | None:
        found = self.results.get("preset")
        return None if found is None else str(found)

    @property
    def name(self) -> str:
        """Of the level, and of the preset if there is one."""
        return self.level if self.preset is None else f"{self.level}-{self.preset}"

    @property
    def results(self) -> Json:
        found: Json = self.document["results"]
        return found

    @property
    def image(self) -> Path:
        return IMAGES / f"level-{self.device}-{self.name}.svg"

    @property
    def command(self) -> str:
        words = [str(word) for word in self.document["command"][1:]]
        for option in ("--json", "--plot", "--budget-s"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        return " ".join(["python -m bench", *words])

    def order(self) -> tuple[str, int, str]:
        """Device, then level, then preset."""
        return self.device, registry.NAMES.index(self.level), self.preset or ""


def level_files(root: Path) -> list[LevelFile]:
    """All committed results of levels, on CPUs and on GPUs.

    Raises:
        ValueError: a file that is not a result of a level, or of its small setting.
    """
    results = root / "bench" / "results"
    found = []
    for path in sorted((results / "cpu" / "levels").glob("*.json")):
        name = path.relative_to(root).as_posix()
        found.append(_checked(LevelFile(name, "cpu", json.loads(path.read_text()))))
    for folder in gpu_folders(results):
        for file in load(folder, root):
            if file.stage.startswith(STAGE) and file.results:
                document = file.benchmark
                found.append(_checked(LevelFile(file.path, folder.name, document, file.status)))
    return sorted(found, key=LevelFile.order)


def _checked(file: LevelFile) -> LevelFile:
    if file.document.get("benchmark") not in registry.NAMES:
        raise ValueError(f"{file.path} is not the result of a level; see python -m bench --help")
    if file.document["settings"].get("small"):
        raise ValueError(f"{file.path} is of --small, which measures nothing; run it without")
    return file


def block(files: Sequence[LevelFile], root: Path) -> str:
    """What stands between the markers of the document."""
    return "\n".join(_section(file, root) for file in files) or UNMEASURED


def _section(file: LevelFile, root: Path) -> str:
    title = file.level if file.preset is None else f"{file.level}, {file.preset}"
    parts = [f"### {title}, {file.device}", _source(file)]
    parts += [table.markdown() for table in _tables(file)]
    if (root / file.image).exists():
        parts.append(f"![{title}](images/{file.image.name})")
    return "\n\n".join(parts) + "\n"


def _source(file: LevelFile) -> str:
    document = file.document
    versions = document["versions"]
    named = ("torch", "transformers", "cuda", "vllm", "flash-attn", "flashinfer-python")
    said = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    machine = document["machine"].get("gpu", {}).get("name") or document["machine"]["cpu"]
    commit = str(document["commit"])
    commit = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
    status = "" if file.status == "passed" else f"; **{file.status}**"
    link = f"[{file.path}](../{file.path})"
    return f"`{file.command}`: {machine}, {said}, commit {commit}; {link}{status}"


def _tables(file: LevelFile) -> list[Table]:
    level, results = registry.load(file.level), file.results
    tables = list(level.tables(results))
    if results.get("published"):
        tables.append(published_table(results["published"]))
    if results.get("absent"):
        tables.append(absent_table(results["absent"]))
    if cut := results.get("cut_for_time"):
        tables.append(Table("no time for", ["what"], [[what] for what in cut]))
    return tables


def with_block(text: str, inner: str) -> str:
    """The document with that between its markers; see :func:`bench.report_files.between`."""
    return between(text, (BEGIN, END), inner, str(DOCUMENT))


def problems(root: Path) -> list[str]:
    """What is not as :func:`update` would leave it; the contents of plots are not compared."""
    path = root / DOCUMENT
    if not path.exists():
        return []
    files, text = level_files(root), path.read_text()
    found = []
    if with_block(text, block(files, root)) != text:
        found.append(f"{DOCUMENT} is not what the results say; run make report")
    known = {file.image.name for file in files}
    there = {image.name for image in (root / IMAGES).glob("level-*.svg")}
    return found + [f"{IMAGES}/{n} has no result; run make report" for n in sorted(there - known)]


def update(root: Path) -> None:
    """Draws the plots, writes the tables, and removes plots whose results are gone."""
    path = root / DOCUMENT
    if not path.exists():
        return
    files = level_files(root)
    drawn = {
        file.image.name
        for file in files
        # Plots of presets would look like their level's; the tables have their figures.
        if file.preset is None
        and write_plot(registry.load(file.level), file.results, root / file.image)
    }
    for image in (root / IMAGES).glob("level-*.svg"):
        if image.name not in drawn:
            image.unlink()
    path.write_text(with_block(path.read_text(), block(files, root)))
