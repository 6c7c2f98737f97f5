"""The scheduler's benchmark at its smallest: it runs, and its JSON has the documented keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.scheduler


def test_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scheduler.json"
    assert bench.scheduler.main(["--sequences", "8", "--steps", "80", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["benchmark"] == "scheduler"
    assert {*document} >= {"machine", "commit", "settings", "results", "targets", "versions"}
    cells = {(r["memory"], r["load"]): r for r in document["results"]}
    assert set(cells) == {(m, w) for m in ("stub", "cache", "engine") for w in ("steady", "churn")}
    for (memory, load), cell in cells.items():
        assert cell["median_running"] == 8
        parts = () if memory == "engine" else bench.scheduler.PARTS
        assert set(cell["us"]) == {*parts, "total"}
        assert all(0 < us["median"] <= us["p99"] for us in cell["us"].values())
        assert (cell["ended"] > 0) == (load == "churn")
    assert len(document["targets"]) == 6
    assert all(target["limit"] == bench.scheduler.TARGET_US for target in document["targets"])
    assert "us per step of 8 sequences" in capsys.readouterr().out


def test_scheduler_refuses_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.scheduler.main(["--steps", "0"])
    assert "'0' is not a positive number" in capsys.readouterr().err
