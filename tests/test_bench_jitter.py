"""bench.jitter at its smallest: counts and bookkeeping are asserted, times are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.jitter
from bench.jitter_loop import WAYS, Times, Traffic, Work
from bench.kernels import load_kernels
from tests.test_bench import load
from vattn import KVCache


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices; two threads only wait for each other
    yield
    torch.set_num_threads(threads)


def test_jitter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "jitter.json"
    arguments = ["--small", "--device", "cpu", "--step-ms", "0.1", "--json", str(path)]
    assert bench.jitter.main(arguments) == 0
    document = load(path, "jitter")
    assert str(tmp_path) not in path.read_text()
    results = document["results"]
    assert results["turns"] == 2
    assert results["cut_for_time"] == []
    by = {row["way"]: row for row in results["ways"]}
    assert list(by) == [way.name for way in WAYS]
    assert {row["steps"] for row in by.values()} == {2 * 4}
    assert set(by["nothing"]["calls_per_step"].values()) == {0.0}
    for name in ("trace", "trace x10", "trace, mapped between steps"):
        calls = by[name]["calls_per_step"]
        # Steady: what is mapped was unmapped elsewhere, not made.
        assert calls["map"] > 0
        assert calls["unmap"] > 0
        assert calls["create"] == calls["destroy"] == 0
        assert by[name]["requests"] > 0
    assert by["trace x10"]["calls_per_step"]["map"] > by["trace"]["calls_per_step"]["map"]
    for row in by.values():
        assert 0 <= row["pages_share"] < 1
        assert row["step_us"]["p50"] <= row["step_us"]["p99"] <= row["step_us"]["max"]
        assert set(row["added_us"]) == {"device_us", "step_us"}
    assert by["nothing"]["added_us"]["step_us"] == dict.fromkeys(("p50", "p90", "p99", "max"), 0.0)
    (target,) = document["targets"]
    assert target["measured"] == by["trace"]["pages_share"]
    assert "mapping on the critical path" in capsys.readouterr().out


def test_jitter_says_what_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "jitter.json"
    arguments = ["--small", "--device", "cpu", "--step-ms", "0.1", "--budget-s", "0"]
    assert bench.jitter.main([*arguments, "--json", str(path)]) == 0
    results = load(path, "jitter")["results"]
    assert results["turns"] == 1  # one always: without it there is no result
    assert results["cut_for_time"] == ["turn 2"]


def test_sizes_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.jitter.main(["--device", "cpu", "--batch", "0"])
    assert "--batch 0 must be at least 1" in capsys.readouterr().err


def test_traffic_grows_by_what_a_step_gets() -> None:
    """Requests take the slots in turn; a fraction of a token waits for the next step."""
    with KVCache(1, 1, 8, torch.float32, max_seqs=4, max_tokens=64, kv_tile_tokens=1) as cache:
        traffic = Traffic(cache, [1, 2, 3], np.array([10, 4]))
        sizes = []
        for _ in range(4):
            traffic.ahead(7.5, mapped=True)
            traffic.commit()
            sizes.append([cache.tokens(s) if cache.is_open(s) else None for s in range(4)])
        assert sizes == [
            [None, 7, None, None],  # 7.5 given
            [None, 10, 4, 1],  # 15: the first ended with 10, the second with 4
            [None, None, None, 8],  # 22.5: those that ended are released while the device works
            [None, 4, 2, 10],  # 30: the third ended, slots 1 and 2 are taken again
        ]
        assert traffic.requests == 5
        traffic.settle()
        assert not any(cache.is_open(slot) for slot in range(4))


def test_pages_that_change_under_the_steps_are_found() -> None:
    (kernel, prepare), *_ = load_kernels("cpu", torch.float32)[0].items()
    with (
        torch.inference_mode(),
        KVCache(2, 2, 16, torch.float32, max_seqs=2, max_tokens=64, device="cpu") as cache,
    ):
        work = Work(cache, kernel, prepare, 1, 64, 2, step_s=0.0)
        assert work.rounds == 1
        work.launch()
        assert work.wait() > 0
        assert work.check() < 1e-4
        k, _ = work._layers[0]
        k[0, 5] = float("nan")
        with pytest.raises(AssertionError, match="relative error nan"):
            work.check()


def test_times_of_turns_are_put_together() -> None:
    one = Times([1e-3], [2e-3], [5e-4])
    one.extend(Times([3e-3], [2e-3], [5e-4]))
    found = one.as_json()
    assert found["steps"] == 2
    assert found["device_us"]["max"] == pytest.approx(3000)
    assert found["pages_share"] == pytest.approx(0.25)
