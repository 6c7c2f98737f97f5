"""``python -m bench LEVEL``: arguments, presets, what is printed and written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import __main__ as command
from bench.common import Json, Target
from bench.levels import registry
from bench.levels.level import Level, Preset, Published
from bench.levels.table import Table
from bench.partial import Partial

PUBLISHED = Published("prefill", "1.24x", "vAttention, table 1", "A100")


class Toy(Level):
    """Counts up to ``--to``."""

    name = "kernels"
    summary = "counts"
    rows = ("cells",)
    defaults: ClassVar[Json] = {"cpu": {"to": 5}, "cuda": {"to": 9}}
    small: ClassVar[Json] = {"to": 2}
    presets: ClassVar[Any] = {
        "paper": Preset("as there", {"cpu": {"to": 7}, "cuda": {}}, {"to": 3}, (PUBLISHED,))
    }

    def add_arguments(self, cli: argparse.ArgumentParser) -> None:
        cli.add_argument("--to", type=int)
        cli.add_argument("--fail", action="store_true")

    def measure(self, args: argparse.Namespace, out: Partial) -> None:
        for n in range(args.to):
            if args.budget.allows(f"number {n}"):
                out.append("cells", {"n": n})
        out.set(absent={"abacus": "not installed"})
        with out.part("the failing one"):
            if args.fail:
                raise RuntimeError("on purpose")

    def tables(self, results: Json) -> list[Table]:
        return [Table("counted", ["n"], [[r["n"]] for r in results.get("cells", ())])]

    def targets(self, settings: Json, results: Json) -> list[Target]:
        most = max((r["n"] for r in results.get("cells", ())), default=None)
        return [Target("counted to", most, 4, "", at_least=True)]

    def draw(self, figure: Any, results: Json) -> bool:
        figure.subplots().plot([r["n"] for r in results["cells"]])
        return True


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load", lambda name: Toy())


def run(tmp_path: Path, *words: str) -> tuple[int, Json]:
    path = tmp_path / "found.json"
    code = command.main(["kernels", "--device", "cpu", "--json", str(path), *words])
    document: Json = json.loads(path.read_text())
    return code, document


def test_the_full_setting_is_the_default(tmp_path: Path) -> None:
    code, document = run(tmp_path)
    assert code == 0
    assert document["benchmark"] == "kernels"
    assert len(document["results"]["cells"]) == document["settings"]["to"] == 5
    assert document["targets"][0]["met"]
    assert not {"json", "plot", "budget"} & set(document["settings"])


def test_a_small_one_has_no_targets(tmp_path: Path) -> None:
    _, document = run(tmp_path, "--small")
    assert document["settings"]["to"] == 2
    assert document["targets"] == []


def test_a_preset_brings_settings_and_published_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, document = run(tmp_path, "--preset", "paper")
    assert (document["settings"]["to"], document["results"]["preset"]) == (7, "paper")
    assert document["results"]["published"][0]["figure"] == "1.24x"
    assert "1.24x" in capsys.readouterr().out
    assert run(tmp_path, "--preset", "paper", "--small")[1]["settings"]["to"] == 3
    assert run(tmp_path, "--preset", "paper", "--to", "4")[1]["settings"]["to"] == 4


def test_what_is_absent_failed_or_cut_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = run(tmp_path, "--fail", "--budget-s", "1e-9")
    told = capsys.readouterr().out
    assert code == 1
    assert document["results"]["failed"][0]["part"] == "the failing one"
    assert document["results"]["cut_for_time"] == [f"number {n}" for n in range(5)]
    for word in ("abacus", "on purpose", "number 4", "nothing was measured"):
        assert word in told


def test_a_plot_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "p.svg", tmp_path / "two" / "p.svg"
    run(tmp_path, "--plot", str(one))
    run(tmp_path, "--plot", str(two))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tea"], "invalid choice: 'tea'"),
        (["kernels", "--preset", "tea"], "invalid choice: 'tea'"),
        (["kernels", "--device", "tea"], "invalid choice: 'tea'"),
        (["kernels", "--to", "tea"], "invalid int value: 'tea'"),
        (["kernels", "--tea"], "unrecognized arguments: --tea"),
    ],
)
def test_bad_arguments_are_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert said in capsys.readouterr().err
