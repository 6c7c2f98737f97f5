"""The ablations at their smallest: counts and equal texts are asserted, times are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from bench.__main__ import main
from bench.levels import registry
from bench.levels.ablations.choices import choices, fresh_storage
from bench.levels.ablations.level import CHOICES, COSTS, Ablations
from bench.shapes import SHAPES, build_model
from tests.test_bench import KEYS
from vattn import LLM

Row = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Row:
    path = tmp_path_factory.mktemp("ablations") / "ablations.json"
    assert main(["ablations", "--small", "--device", "cpu", "--json", str(path)]) == 0
    found: Row = json.loads(path.read_text())
    assert set(found) == KEYS
    assert found["benchmark"] == "ablations"
    return found


def rows_of(document: Row, choice: str) -> dict[str, Row]:
    """By what ours is compared with."""
    rows = [row for row in document["results"]["choices"] if row["choice"] == choice]
    return {row["other"]["what"]: row for row in rows}


def test_every_choice_is_there_or_absent_with_a_reason(document: Row) -> None:
    results = document["results"]
    measured = {row["choice"] for row in results["choices"]}
    absent = {label.partition(":")[0] for label in results["absent"]}
    assert measured | absent == set(CHOICES)
    assert absent == {"asynchronous scheduling"}
    assert "nothing to choose on cpu" in results["absent"]["asynchronous scheduling: off"]


def test_both_sides_do_the_same(document: Row) -> None:
    for row in document["results"]["choices"]:
        assert row["equal_texts"] == row["compared_texts"] > 0, row
        assert row["ours"]["ran"]["preemptions"] == row["other"]["ran"]["preemptions"] == 0
        assert len(row["ratio"]["repeats"]) == 2
        for side in (row["ours"], row["other"]):
            assert side["token_bytes"] <= side["live_bytes"] <= side["peak_physical_bytes"]
            assert side["completed"] == row["requests"]


def test_without_deferred_reclamation_the_driver_is_called_more(document: Row) -> None:
    (row,) = rows_of(document, "deferred reclamation").values()
    ours, other = row["ours"]["calls"], row["other"]["calls"]
    assert ours["unmap"] == 0 < other["unmap"]
    assert ours["map"] < other["map"]


def test_smaller_pages_waste_less(document: Row) -> None:
    rows = rows_of(document, "page size")
    assert set(rows) == {"pages of 4K", "pages of 64K", "pages of 2M"}
    ours = rows["pages of 4K"]["ours"]["live_share"]
    assert rows["pages of 4K"]["other"]["live_share"] > ours
    assert ours > rows["pages of 64K"]["other"]["live_share"]
    least = rows["pages of 2M"]["other"]
    assert rows["pages of 64K"]["other"]["live_share"] > least["live_share"]
    assert least["peak_physical_bytes"] % (2 << 20) == 0


def test_only_ours_finds_shared_prefixes(document: Row) -> None:
    (row,) = rows_of(document, "prefix caching").values()
    assert row["workload"] == "prefix"
    assert row["ours"]["ran"]["prefix_cache_hits"] > 0
    assert row["other"]["ran"]["prefix_cache_hits"] == 0


def test_loops_at_published_costs(document: Row) -> None:
    loops = {row["way"]: row for row in document["results"]["loops"]}
    assert list(loops) == ["ahead", "sync", "sync fresh", "free"]
    calls = {way: row["calls_per_step"] for way, row in loops.items()}
    assert calls["sync"]["unmap"] < calls["sync fresh"]["unmap"]
    assert document["results"]["costs_us"]["cuMemSetAccess"] == 38


def test_results_can_be_rendered(document: Row) -> None:
    level = registry.load("ablations")
    tables = level.tables(document["results"])
    assert [len(table.rows) for table in tables] == [8, 4]
    assert all(table.markdown().count("\n") > len(table.rows) for table in tables)
    assert level.draw(Figure(), document["results"])
    assert level.tables({}) == []
    assert not level.draw(Figure(), {})


def test_some_choices_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    words = ["--small", "--device", "cpu", "--choices", "layout", "--json", str(path)]
    assert main(["ablations", *words]) == 0
    results = json.loads(path.read_text())["results"]
    assert {row["choice"] for row in results["choices"]} == {"layout"}
    assert "loops" not in results


def test_an_unknown_choice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ablations", "--small", "--choices", "swap"])
    assert "'swap' is not one of mapping ahead" in capsys.readouterr().err


def test_a_gpu_has_choices_of_its_own() -> None:
    cuda = {choice.label for choice in choices("cuda", 32)}
    assert {"page size: pages of 4M", "page size: pages of 8M"} <= cuda
    assert "layout: token order, 32 layers per region, all" in cuda
    assert {choice.name for choice in choices("cuda", 32)} == set(CHOICES)
    assert set(Ablations.presets["paper-policies"].settings["cpu"]["choices"]) <= {*CHOICES, COSTS}


def test_fresh_storage_keeps_no_prefixes() -> None:
    model = build_model(SHAPES["tiny-llama"], "cpu", torch.float32, 64)
    with pytest.raises(ValueError, match="give enable_prefix_caching=False"):
        LLM(model=model, skip_tokenizer_init=True, storage=fresh_storage)
