"""The replay of allocation traces: its checks, its refusals, and the bench's tables and JSON."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.allocator
from bench.alloc_traces.trace_file import AllocTrace
from bench.allocator import LEAST_PEAK_BYTES, make_targets
from bench.allocator_native import POLICIES, Replay, ReplayFailed
from tests.alloc_records import GIB, KIB, MIB, Record, Run, random_records, release, request, runner


@pytest.fixture(scope="session")
def replay() -> Replay:
    return Replay.find()


@pytest.fixture
def run(replay: Replay, tmp_path: Path) -> Run:
    return runner(replay, tmp_path)


# The replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_passes_the_checks(run: Run, policy: str) -> None:
    records = random_records(random.Random(5), 3000, largest=24)
    found = run(policy, records, repeat=1)
    assert found["out_of_memory_at"] is None
    assert found["peak_physical_bytes"] >= found["peak_live_bytes"] > 0
    assert found["driver_calls"] == sum(found["calls"].values())
    assert found["driver_calls"] == sum(found["driver_calls_by_tenth"])
    assert found["driver_calls_second_half"] == sum(found["driver_calls_by_tenth"][5:])
    assert found["ns_per_op"] > 0
    assert found["streams"] == 2
    assert found["operations"] == 3000


@pytest.mark.parametrize("policy", ["vattn", "native", "expandable"])
def test_a_repeated_step_needs_no_driver(run: Run, policy: str) -> None:
    step = [request(0, 3), request(1, 40), *release(0), request(2, 0.1), *release(1, 2)]
    found = run(policy, step * 10)
    assert found["driver_calls_second_half"] == 0
    assert found["driver_calls"] > 0


def test_checks_notice_a_broken_policy(replay: Replay) -> None:
    done = subprocess.run([replay.program, "--self-test"], capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert done.returncode == 0
    expected = {
        "overlap": "overlaps a live block",
        "alignment": "not aligned to 512",
        "null": "is null",
        "physical": "4096 live bytes on 2048 bytes of pages",
        "check": "an invariant does not hold",
        "close": "a page is left",
    }
    assert set(said) == set(expected)
    for rule, words in expected.items():
        assert words in said[rule]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([request(3, 1), request(3, 1)], "record 1: id 3 is in use already"),
        ([request(3, 1), *release(3, 3)], "record 2: id 3 is not in use"),
        (release(0), "record 0: id 0 is not in use"),
        ([], "is empty"),
    ],
)
def test_bad_trace(run: Run, records: Sequence[Record], message: str) -> None:
    with pytest.raises(ReplayFailed, match=message):
        run("native", records)


def test_truncated_trace(replay: Replay, tmp_path: Path) -> None:
    raw = tmp_path / "cut.raw"
    raw.write_bytes(struct.pack("<IIQ", 0, 0, 512)[:-1])
    with pytest.raises(ReplayFailed, match="has 15 bytes, not whole records of 16"):
        replay.trace(raw, "native", GIB, 0)
    with pytest.raises(ReplayFailed, match="cannot read"):
        replay.trace(tmp_path / "absent.raw", "native", GIB, 0)


def test_bad_arguments(run: Run) -> None:
    one = [request(0, 1)]
    with pytest.raises(ReplayFailed, match="no policy 'best'; use vattn, native, expandable or"):
        run("best", one)
    with pytest.raises(ReplayFailed, match="--device-memory 1: give a whole number from 2097152"):
        run("native", one, device=1)
    with pytest.raises(ReplayFailed, match="--repeat -1: give a whole number"):
        run("native", one, repeat=-1)


@pytest.mark.parametrize("policy", ["vattn", "native"])
def test_pair(replay: Replay, policy: str) -> None:
    found = replay.pair(64 * KIB, policy, threads=2)
    assert found["bytes"] == 64 * KIB
    assert found["threads"] == 2
    assert found["driver_calls"] == 0
    assert min(found["single_ns"], found["threads_ns"], found["ratio"]) > 0


# The bench ----------------------------------------------------------------------------------------


def save_trace(path: Path, records: Sequence[Record], steady_from: int = -1) -> None:
    blocks, streams, sizes = zip(*records, strict=True)
    AllocTrace(
        name=path.stem,
        ids=np.array(blocks, np.uint32),
        sizes=np.array(sizes, np.uint64),
        streams=np.array(streams, np.uint8),
        steady_from=steady_from,
    ).save(path)


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object per trace and policy, with the documented keys, in the order given."""
    step = [request(0, 9), request(1, 12), *release(0, 1)]
    save_trace(tmp_path / "steps.npz", step * 4, steady_from=4)
    save_trace(tmp_path / "once.npz", step[:2])
    path = tmp_path / "allocator.json"
    words = ["--trace", str(tmp_path / "steps.npz"), "--trace", str(tmp_path / "once.npz")]
    words += ["--policy", "native,expandable,vattn", "--device-memory", "1GiB", "--repeat", "1"]
    assert bench.allocator.main([*words, "--pairs", "512", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert set(document) == {
        *("benchmark", "time", "versions", "commit", "machine", "command"),
        *("settings", "results", "targets", "pairs"),
    }
    rows = document["results"]
    policies = ["native", "expandable", "vattn"]
    assert [(row["trace"], row["policy"]) for row in rows] == [
        (trace, policy) for trace in ("steps", "once") for policy in policies
    ]
    asked = {"trace", "policy", "peak_live_bytes", "peak_physical_bytes", "driver_calls"}
    assert all(asked | {"ns_per_op"} <= set(row) for row in rows)
    assert [row["steady"] for row in rows] == [True] * 3 + [False] * 3
    assert {row["peak_live_bytes"] for row in rows} == {21 * MIB}
    assert rows[0]["peak_physical_bytes"] == 32 * MIB
    assert rows[1]["peak_physical_bytes"] == 40 * MIB
    assert [pair["policy"] for pair in document["pairs"]] == ["vattn", "native"]
    assert "cached allocate + free, ns" in capsys.readouterr().out


def row_of(trace: str, policy: str, physical: int, live: int = GIB, calls: int = 0) -> Any:
    return {
        "trace": trace,
        "policy": policy,
        "peak_live_bytes": live,
        "peak_physical_bytes": physical,
        "driver_calls_second_half": calls,
        "ratio": physical / live,
        "steady": True,
    }


def test_targets_name_the_worst_trace() -> None:
    rows = [
        row_of("a", "vattn", GIB + 10 * MIB),
        row_of("a", "native", GIB + 20 * MIB),
        row_of("a", "expandable", GIB + 5 * MIB),
        row_of("b", "vattn", 2 * GIB, calls=3),
        row_of("b", "native", 3 * GIB),
        row_of("small", "vattn", 3 * GIB, live=LEAST_PEAK_BYTES),
        row_of("full", "vattn", 0) | {"ratio": None},
    ]
    pairs = [{"policy": "vattn", "bytes": 512, "single_ns": 301.0, "ratio": 1.5}]
    targets = {target.name: target for target in make_targets(rows, pairs, 2)}
    assert [(t.measured, t.note, t.met) for t in targets.values()] == [
        (1, "full", False),
        (2.0, "b", False),
        (pytest.approx(1034 / 1029), "a", False),
        (3, "b", False),
        (301.0, "512B", False),
        (1.5, "512B", True),
    ]
    assert [t.met for t in make_targets([], [], 2)[1:]] == [None] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "best"], "best: there is no such policy; use vattn, native"),
        (["--trace", "absent.npz"], "--trace absent.npz does not exist"),
        (["--replay", "absent"], "--replay absent does not exist"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.allocator.main(words)
    assert message in capsys.readouterr().err
