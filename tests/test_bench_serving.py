"""The server's benchmark at its smallest: real processes, equal texts, and a row for each side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench.serving


def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "server.json"
    assert bench.serving.main(["--small", "--threads", "1", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["benchmark"] == "server"
    assert document["targets"] == []  # of small settings there are none
    assert [row["side"] for row in document["results"]] == list(bench.serving.SIDES)
    for row in document["results"]:
        assert row["tokens_per_s"] > 0
        assert row["of_offline"]["pairs"] == 1
        assert row["ttft_ms"]["p50"] > 0
        assert row["itl_ms"]["p50"] > 0
    assert "ratio to offline" in capsys.readouterr().out


def test_no_streams_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.serving.main(["--streams", "0"])
    assert "--streams 0 has to be at least 1" in capsys.readouterr().err
