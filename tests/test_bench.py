"""The benchmarks at their smallest: they run on a CPU, and their JSON has the documented keys."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.cache
import bench.layout
import bench.vmm
from bench.cache_memory import measure_memory
from bench.cache_model import Shape
from bench.common import Budget, Target, counts, measure_pairs, sizes
from bench.vmm_ops import OPS
from bench.waste import draw_lengths, footprint, read_lengths
from tests.fake_cuda.fake import FakeCuda
from vattn import KVCache

KEYS = {
    *("benchmark", "time", "versions", "commit", "machine", "command"),
    *("settings", "results", "targets"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; two threads only wait for each other
    yield
    torch.set_num_threads(threads)


def load(path: Path, benchmark: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert set(document) == KEYS
    assert document["benchmark"] == benchmark
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cpus"] >= 1
    return document


# Benchmarks ---------------------------------------------------------------------------------------


def test_vmm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vmm.json"
    arguments = ["--driver", "host", "--pages", "16KiB", "--runs", "1,4", "--rounds", "2"]
    arguments += ["--pairs", "3", "--sequences", "8", "--touch-mib", "2", "--json", str(path)]
    assert bench.vmm.main(arguments) == 0
    results = load(path, "vmm")["results"]
    operations = {(r["op"], r["run_pages"]): r for r in results["operations"]}
    assert operations["map", 4]["run_api_calls"] == 1
    assert operations["map", 4]["single_api_calls"] == 4
    assert all(r["run_us_per_page"] > 0 for r in results["operations"] if r["op"] != "set_access")
    assert {(r["run_pages"], r["kind"]) for r in results["bare_map"]} == {
        *((1, "neighbours"), (1, "new")),
        *((4, "neighbours"), (4, "scattered"), (4, "new")),
    }
    assert {r["what"] for r in results["ensure"]["python"]} == {
        *("same lengths", "one more token each"),
    }
    assert results["cut_for_time"] == []
    assert "targets" in capsys.readouterr().out


def test_vmm_says_what_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "vmm.json"
    arguments = ["--driver", "host", "--pages", "16KiB", "--runs", "4", "--budget-s", "0"]
    assert bench.vmm.main([*arguments, "--json", str(path)]) == 0
    results = load(path, "vmm")["results"]
    cut = ["operations: host, 16K x 4", "touch", "ensure", "bare_map"]
    assert results["cut_for_time"] == cut
    assert results["operations"] == []


def test_vmm_measures_every_page_size_of_a_gpu(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    path = tmp_path / "vmm.json"
    arguments = ["--driver", "fake", "--runs", "1,2", "--rounds", "1", "--json", str(path)]
    assert bench.vmm.main([*arguments, "--sequences", "8", "--pairs", "1"]) == 0
    rows = {
        (r["page_bytes"] >> 20, r["run_pages"], r["op"]): r
        for r in load(path, "vmm")["results"]["operations"]
    }
    sizes = {(mib, run) for mib, run, _ in rows}
    assert sizes == {(mib, run) for mib in (2, 4, 8, 16, 32) for run in (1, 2)}
    assert {op for _, _, op in rows} == set(OPS)
    # Access is set and ranges are unmapped in one call, pages are created and mapped one by one.
    calls = {
        op: rows[32, 2, op]["run_api_calls"] for op in ("set_access", "unmap", "create", "map")
    }
    assert calls == {"set_access": 1, "unmap": 1, "create": 2, "map": 2}
    assert rows[32, 2, "set_access"]["single_api_calls"] == 2


def test_vmm_keeps_the_rules_of_cuda(fake_cuda: FakeCuda) -> None:
    arguments = ["--driver", "fake", "--runs", "1,3", "--rounds", "1", "--pages", "2MiB"]
    assert bench.vmm.main(arguments) == 0
    assert fake_cuda.calls("cuMemMap") > 0  # the fixture looks for broken rules and leaks


def test_vmm_names_a_driver_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.vmm, "FAKE", Path("/nowhere/libfake_cuda.so"))
    assert bench.vmm.main(["--driver", "fake"]) == 1
    assert "no fake driver: /nowhere/libfake_cuda.so is not built" in capsys.readouterr().out


def test_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    arguments = ["--small", "--shape", "2x48", "--pairs", "3", "--no-memory", "--json", str(path)]
    assert bench.cache.main(arguments) == 0
    (result,) = load(path, "cache")["results"]
    assert result["decode"]["tokens_equal"] == {"dynamic": True, "static": True}
    assert result["decode"]["distinct_tokens"] > 2
    for phase in ("prefill", "decode"):
        assert set(result[phase]["ratios"]) == {"dynamic", "static"}
        assert result[phase]["ratios"]["dynamic"]["ratio"] > 0


def test_cache_memory_is_given_back() -> None:
    shape = Shape(2, 128, 2, 2, batch=2, tokens=300, steps=4, chunk=128)
    found = measure_memory("virtual", shape)
    virtual = found["virtual"]
    tokens = shape.tokens + shape.steps
    assert virtual["token_bytes"] == 2 * tokens * shape.token_bytes
    assert virtual["token_bytes"] <= virtual["live_bytes"] <= virtual["live_limit_bytes"]
    assert virtual["after_release"]["stale_bytes"] == virtual["physical_bytes"]
    assert virtual["after_trim"] == {
        "returned_bytes": virtual["physical_bytes"],
        "physical_bytes": 0,
    }
    assert found["peak_over_model_bytes"] > virtual["live_bytes"]


def test_layout(tmp_path: Path) -> None:
    path, trace = tmp_path / "layout.json", tmp_path / "trace.csv.gz"
    with gzip.open(trace, "wt") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,28\nx,300,20\n")
    arguments = ["--device", "cpu", "--layers", "2", "--heads", "2", "--kv-heads", "2"]
    arguments += ["--lengths", "128", "--batches", "2", "--queries", "1,4", "--pairs", "2"]
    arguments += ["--pages", "16KiB", "--layers-per-region", "1,all", "--tiles", "64"]
    arguments += ["--trace", str(trace), "--json", str(path)]
    assert bench.layout.main(arguments) == 0
    results = load(path, "layout")["results"]
    assert results["failed"] == results["cut_for_time"] == results["cut_for_memory"] == []
    # head order once, token order for one and for all layers per region; decode and a chunk
    assert len(results["cells"]) == 3 * 2
    for cell in results["cells"]:
        assert cell["kernel"] == "sdpa/dense"
        assert cell["ratio"] > 0
    assert all(row["live_bytes"] >= row["token_bytes"] for row in results["memory"])
    assert len(results["memory"]) == len(results["cells"])
    assert all(row["relative_error"] < 1e-4 for row in results["relative_errors"])
    layouts = results["trace"]["layouts"]
    assert results["trace"]["requests"] == 2
    assert layouts[0]["growth"]["driver_calls"]["map"] >= 1
    assert layouts[0]["token_bytes"] == (128 + 320) * 2 * 2 * 2 * 64 * 4


def test_layout_says_what_it_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layout.json"
    arguments = ["--device", "cpu", "--layers", "2", "--lengths", "64", "--batches", "1"]
    arguments += ["--pages", "16KiB", "--pairs", "1", "--budget-s", "0", "--json", str(path)]
    assert bench.layout.main(arguments) == 0
    results = load(path, "layout")["results"]
    assert results["cells"] == []
    assert len(results["cut_for_time"]) > 0
    assert "cut_for_time" in capsys.readouterr().out


# Parts --------------------------------------------------------------------------------------------


def test_footprint_is_what_a_cache_reports() -> None:
    tiles, page = (16, 24), 4096
    lengths = [1, 17, 64, 100]
    for order in ("token", "head"):
        with KVCache(
            *(3, 2, 16, torch.float32),
            max_seqs=4,
            max_tokens=128,
            page_bytes=page,
            order=order,
            layers_per_region=2,
            kv_tile_tokens=tiles,
        ) as cache:
            for length in lengths:
                cache.ensure(cache.open(), length)
            stats = cache.stats()
            found = footprint(cache.layout.regions, page, tiles, np.array(lengths))
        assert found.token_bytes == stats.token_bytes
        assert found.live_bytes == stats.live_bytes
        assert found.cover_bytes == stats.cover_bytes


def test_the_drawn_lengths_have_the_means_of_the_trace() -> None:
    lengths = draw_lengths(20_000)
    assert lengths.min() >= 2
    assert float(lengths.mean()) == pytest.approx(1155 + 211, rel=0.02)


def test_a_trace_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="ContextTokens"):
        read_lengths(path)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ValueError, match="no requests"):
        read_lengths(path)


def test_pairs_divide_neighbours() -> None:
    # Base first, then the candidate first, then base first again.
    seconds = iter([2.0, 1.0, 4.0, 2.0, 9.0, 3.0])
    pairs = measure_pairs(
        lambda: None, lambda: None, pairs=3, warmup=0, clock=lambda _: next(seconds)
    )
    assert pairs.ratio == pytest.approx(2.0)  # of 2 / 1, 2 / 4 and 9 / 3
    assert (pairs.base_us, pairs.candidate_us) == (2e6, 3e6)


def test_arguments() -> None:
    assert counts("1,8,64K") == [1, 8, 65536]
    assert sizes("16KiB,2MiB") == [16384, 2 << 20]
    target = Target("x", 1.2, 1.25, "x", at_least=True)
    assert target.met is False
    assert Target("x", None, 1.25, "x", at_least=True).met is None
    budget = Budget(0)
    assert not budget.allows("all")
    assert budget.cut == ["all"]
