"""The allocator level: bench.allocator's replays as rows, a plot, and what is left to a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.alloc_traces.trace_file import AllocTrace
from bench.allocator import TRACES
from bench.allocator_native import POLICIES
from bench.common import Json
from bench.levels.allocator import _KEPT, GPU, Allocator
from bench.levels.plot import write_plot


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Json:
    path = tmp_path_factory.mktemp("level") / "allocator.json"
    plot = path.with_suffix(".svg")
    assert main(["allocator", "--small", "--json", str(path), "--plot", str(plot)]) == 0
    assert "peak physical / peak live bytes" in plot.read_text()
    found: Json = json.loads(path.read_text())
    return found


def test_every_policy_replays_every_trace(document: Json) -> None:
    results = document["results"]
    assert "failed" not in results
    assert document["benchmark"] == "allocator"
    assert set(results["absent"]) == {GPU}
    names = document["settings"]["trace"]
    assert all("/" not in name for name in names)  # results name no folders
    rows = {(row["trace"], row["policy"]): row for row in results["replays"]}
    traces = [AllocTrace.load(TRACES / name) for name in names]
    assert set(rows) == {(trace.name, policy) for trace in traces for policy in POLICIES}
    for trace in traces:
        of = [rows[trace.name, policy] for policy in POLICIES]
        assert {row["operations"] for row in of} == {trace.operations}
        assert len({row["peak_live_bytes"] for row in of}) == 1
        for row in of:
            assert set(row) == set(_KEPT)
            expected = row["peak_physical_bytes"] / row["peak_live_bytes"]
            assert row["ratio"] == pytest.approx(expected, abs=1e-4)
            assert row["ratio"] >= 1
    assert rows["train_steady", "vattn"]["driver_calls_second_half"] == 0
    assert [pair["policy"] for pair in results["pairs"]] == ["vattn", "native"]
    assert [pair["driver_calls"] for pair in results["pairs"]] == [0, 0]


def test_results_alone_make_tables_targets_and_plot(document: Json, tmp_path: Path) -> None:
    level, results = Allocator(), document["results"]
    replays, pairs = level.tables(results)
    assert len(replays.rows) == len(results["replays"])
    assert len(pairs.rows) == 2
    assert "train_steady" in replays.markdown()
    assert not write_plot(level, {}, tmp_path / "none.svg")
    targets = level.targets(document["settings"], results)
    ratio = max(r["ratio"] for r in results["replays"] if r["policy"] == "vattn")
    assert targets[1].measured == ratio
    assert "in 2 threads" in targets[-1].name
    for row in results["replays"]:
        row["ratio"] = None
    assert not write_plot(level, results, tmp_path / "none.svg")
    assert level.targets(document["settings"], results)[0].met is False  # none fits
    assert level.tables(results)[0].rows[0][5] == "too large"
    assert level.targets(document["settings"] | {"policy": ["native"]}, results) == []


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["allocator", "--small", "--replay", str(tmp_path / "absent")]) == 1
    assert "does not exist" in capsys.readouterr().out
    assert main(["allocator", "--small", "--trace", "absent.npz", "--pair-sizes", "512"]) == 1
    assert "--trace absent.npz does not exist" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["allocator", "--policy", "best"])
    assert "best: there is no such policy" in capsys.readouterr().err
