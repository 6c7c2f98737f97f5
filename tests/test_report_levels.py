"""docs/levels.md: rendered from committed results and from nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import report_levels
from bench.common import Json, Target
from bench.levels import registry
from bench.levels.level import Level
from bench.levels.repeat import Repeated, cell, repeated
from bench.levels.table import Table
from bench.partial import Partial
from bench.provenance import ROOT
from tests.test_report import COMMIT, stage

DOCUMENT = f"# x\n{report_levels.BEGIN}\nold\n{report_levels.END}\nrest\n"


class Counted(Level):
    """A level of one row."""

    name = "kernels"
    summary = "counts"
    rows = ("rows",)
    defaults: ClassVar[Json] = {"cpu": {}, "cuda": {}}
    small: ClassVar[Json] = {}

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        del cli

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        out.append("rows", {"n": 1})

    def tables(self, results: Json) -> list[Table]:
        return [Table("counts", ["n"], [[row["n"]] for row in results["rows"]], "a note")]

    def targets(self, settings: Json, results: Json) -> list[Target]:
        return []

    def draw(self, figure: Any, results: Json) -> bool:
        figure.subplots().plot([row["n"] for row in results["rows"]])
        return True


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "load", lambda name: Counted())
    (tmp_path / "docs").mkdir()
    (tmp_path / report_levels.DOCUMENT).write_text(DOCUMENT)
    return tmp_path


def put(root: Path, results: Json, *, name: str = "kernels", **changes: Any) -> Path:
    document = {
        "benchmark": "kernels",
        "settings": {"small": False},
        "results": results,
        "targets": [],
        "versions": {"torch": "2.13.0"},
        "commit": COMMIT + "-dirty",
        "machine": {"cpu": "a processor"},
        "command": ["__main__.py", "kernels", "--json", "kernels.json", "--trace", "conv.csv.gz"],
        **changes,
    }
    path = root / "bench/results/cpu/levels" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_results_become_tables_and_plots(root: Path) -> None:
    published = {"what": "prefill", "figure": "1.2x", "setting": "A100", "source": "a paper"}
    put(root, {"rows": [{"n": 7}], "absent": {"fa3": "not installed"}, "published": [published]})
    assert report_levels.problems(root)
    report_levels.update(root)
    assert report_levels.problems(root) == []
    text = (root / report_levels.DOCUMENT).read_text()
    assert "### kernels, cpu" in text
    assert "`python -m bench kernels --trace conv.csv.gz`" in text
    assert "commit 0123456-dirty" in text
    assert "| 7 |" in text
    assert "a note" in text
    assert "| fa3 | not installed |" in text
    assert "| prefill | 1.2x | A100 | a paper |" in text
    assert "![kernels](images/level-cpu-kernels.svg)" in text
    assert (root / "docs/images/level-cpu-kernels.svg").read_text().startswith("<?xml")
    assert text.startswith("# x\n")
    assert text.endswith("rest\n")


def test_presets_stand_beside_the_level(root: Path) -> None:
    put(root, {"rows": [{"n": 1}]})
    put(root, {"rows": [{"n": 2}], "preset": "paper-prefill"}, name="kernels-paper-prefill")
    names = [file.name for file in report_levels.level_files(root)]
    assert names == ["kernels", "kernels-paper-prefill"]


def test_stages_of_a_gpu_are_shown_with_their_status(root: Path) -> None:
    found = stage("level-kernels", {"rows": [{"n": 3}]}, status="partial", note="")
    inner = found["results"] | {"benchmark": "kernels", "commit": COMMIT, "machine": {"cpu": "c"}}
    inner |= {"versions": {"torch": "2.11.0"}, "command": ["__main__.py", "kernels"]}
    folder = root / "bench/results/nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "level-kernels.json").write_text(json.dumps(found | {"results": inner}))
    report_levels.update(root)
    text = (root / report_levels.DOCUMENT).read_text()
    assert "### kernels, nvidia-h200" in text
    assert "**partial**" in text


def test_small_settings_and_strangers_are_refused(root: Path) -> None:
    path = put(root, {"rows": []}, settings={"small": True})
    with pytest.raises(ValueError, match="is of --small"):
        report_levels.level_files(root)
    path.unlink()
    put(root, {}, benchmark="tea")
    with pytest.raises(ValueError, match="not the result of a level"):
        report_levels.level_files(root)


def test_what_has_no_result_goes(root: Path) -> None:
    path = put(root, {"rows": [{"n": 7}]})
    report_levels.update(root)
    path.unlink()
    assert any("has no result" in problem for problem in report_levels.problems(root))
    report_levels.update(root)
    assert report_levels.problems(root) == []
    assert report_levels.UNMEASURED in (root / report_levels.DOCUMENT).read_text()
    assert not list((root / "docs/images").glob("level-*.svg"))


def test_a_document_without_markers_is_told(root: Path) -> None:
    (root / report_levels.DOCUMENT).write_text("nothing")
    with pytest.raises(ValueError, match="once each"):
        report_levels.update(root)


def test_the_project_s_own_document_is_what_its_results_say() -> None:
    assert report_levels.problems(ROOT) == []


def test_a_table_has_as_many_cells_as_columns() -> None:
    with pytest.raises(ValueError, match="has not 2 cells"):
        Table("t", ["a", "b"], [[1]])
    rows: list[list[object]] = [["a|b", None], [0.123456, 12345]]
    assert Table("t", ["x", "y"], rows).markdown().splitlines()[-2:] == [
        "| a\\|b | - |",
        "| 0.123 | 12,345 |",
    ]


def test_repeats_state_their_spread_where_they_disagree() -> None:
    close = Repeated(1.5, (1.45, 1.5, 1.55), 3.0, 2.0).as_json()
    apart = Repeated(1.5, (1.2, 1.5, 1.55), 3.0, 2.0).as_json()
    assert close["agrees"]
    assert cell(close) == "1.50"
    assert not apart["agrees"]
    assert cell(apart) == "1.50 (1.20-1.55)"
    assert cell(None) == "-"
    with pytest.raises(ValueError, match="at least one"):
        repeated([])
