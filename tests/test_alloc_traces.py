"""Traces of allocations: their file, how events become one, and the ones in the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.alloc_traces.builder import TraceBuilder, steady_start
from bench.alloc_traces.record import DATA, WORKLOADS
from bench.alloc_traces.trace_file import AllocTrace
from tests.alloc_trace_records import Record, make_trace, records_of

GOOD: list[Record] = [(0, 0, 1000), (7, 2, 1), (0, 0, 0), (0, 1, 2**40), (7, 2, 0)]


# The file


def test_file_round_trip(tmp_path: Path) -> None:
    trace = make_trace(GOOD, steady_from=3, meta={"torch": "2", "settings": {"steps": 3}})
    path = tmp_path / "made.npz"
    trace.save(path)
    loaded = AllocTrace.load(path)
    assert records_of(loaded) == GOOD
    assert (loaded.name, loaded.steady_from, loaded.meta) == ("made", 3, trace.meta)
    again = tmp_path / "again.npz"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_raw_records() -> None:
    raw = make_trace([(1, 2, 2**33), (1, 2, 0)]).raw()
    assert raw == bytes.fromhex("01000000 02000000 00000000 02000000") + bytes.fromhex(
        "01000000 02000000 00000000 00000000"
    )


def test_live_bytes_are_rounded_per_block() -> None:
    trace = make_trace([(0, 0, 1), (1, 0, 513), (0, 0, 0), (0, 0, 512), (2, 0, 512), (1, 0, 0)])
    assert trace.operations == 6
    assert trace.peak_live_bytes == 1024 + 512 + 512
    assert trace.live_at_end == 1024
    empty = make_trace([])
    assert (empty.peak_live_bytes, empty.live_at_end, empty.raw()) == (0, 0, b"")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([(0, 0, 5), (1, 0, 0)], "record 1: id 1 is released and was never requested"),
        ([(0, 0, 5), (0, 0, 0), (0, 0, 0)], "record 2: id 0 is released, and was by record 1"),
        ([(3, 0, 5), (1, 0, 5), (3, 0, 6)], "record 2: id 3 is requested, and was by record 0"),
        ([(0, 1, 5), (0, 2, 0)], "record 1: id 0 is released on stream 2; .* stream 1"),
        # The first of two.
        ([(0, 0, 5), (9, 0, 0), (0, 0, 5)], "record 1: id 9 is released and was never"),
    ],
)
def test_first_bad_record_is_named(records: list[Record], message: str, tmp_path: Path) -> None:
    trace = make_trace(records)
    for use in (trace.validate, lambda: trace.peak_live_bytes, lambda: trace.live_at_end):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match=message):
        trace.save(tmp_path / "bad.npz")
    assert not (tmp_path / "bad.npz").exists()


def test_bad_columns() -> None:
    trace = make_trace(GOOD)
    with pytest.raises(ValueError, match=r"sizes is int64\[5\]; give uint64\[5\]"):
        AllocTrace("made", trace.ids, trace.sizes.astype(np.int64), trace.streams)
    with pytest.raises(ValueError, match=r"streams is uint8\[4\]; give uint8\[5\]"):
        AllocTrace("made", trace.ids, trace.sizes, trace.streams[:4])
    with pytest.raises(ValueError, match="steady_from is 5; give a record's number below 5"):
        make_trace(GOOD, steady_from=5)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    with pytest.raises(FileNotFoundError):
        AllocTrace.load(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"other.npz is not a trace"):
        AllocTrace.load(path)
    np.savez(path, ids=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz is not a trace"):
        AllocTrace.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array.npy is not a trace"):
        AllocTrace.load(tmp_path / "array.npy")


# Events


def test_builder_gives_the_lowest_spare_id() -> None:
    builder = TraceBuilder()
    for address in (10, 20, 30):
        builder.request(address, 100 + address)
    for address in (30, 10, 99):
        builder.release(address)
    builder.request(99, 7, stream=3)
    builder.release(99)
    trace = builder.build("built", {"by": "hand"})
    assert records_of(trace) == [
        (0, 0, 110),
        (1, 0, 120),
        (2, 0, 130),
        (2, 0, 0),
        (0, 0, 0),
        (0, 3, 7),
        (0, 3, 0),
    ]
    assert trace.meta == {"by": "hand", "iterations": 0, "releases_of_older_blocks": 1}


def test_builder_refuses_what_cannot_be() -> None:
    builder = TraceBuilder()
    with pytest.raises(ValueError, match="nothing was allocated"):
        builder.build("empty", {})
    builder.request(16, 1)
    with pytest.raises(ValueError, match="requests 2 bytes at 0x10, where a block is alive"):
        builder.request(16, 2)
    with pytest.raises(ValueError, match="a request of 0 bytes at 0x20"):
        builder.request(32, 0)
    with pytest.raises(ValueError, match="stream 256"):
        builder.request(32, 1, stream=256)
    assert records_of(builder.build("kept", {})) == [(0, 0, 1)]


@pytest.mark.parametrize(
    ("starts", "records", "expected"),
    [
        ([], [1, 2], -1),
        ([0], [1, 2], -1),
        ([0, 2], [1, 2, 1, 2], 0),
        ([1, 3, 5], [9, 8, 8, 1, 2, 1, 2], 3),
        ([0, 2, 4], [1, 2, 1, 2, 1, 3], -1),
        ([0, 2, 4], [1, 2, 1, 2, 1], -1),
    ],
)
def test_steady_start(starts: list[int], records: list[int], expected: int) -> None:
    assert steady_start(starts, records) == expected


# The files in the repository

# Operations and peak in MiB, as `python -m bench.alloc_traces.record --list` shows them.
RECORDED = {
    "train_varying": (81368, 999.4),
    "train_steady": (40856, 749.1),
    "moe": (51332, 1057.9),
    "beam": (126611, 428.8),
    "serving": (154609, 737.7),
    "two_streams": (193391, 1040.4),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_recorded_trace(name: str) -> None:
    path = DATA / f"{name}.npz"
    trace = AllocTrace.load(path)
    assert trace.name == name
    assert (trace.operations, round(trace.peak_live_bytes / 2**20, 1)) == RECORDED[name]
    assert 10_000 <= trace.operations <= 200_000
    assert trace.peak_live_bytes > 256 << 20
    assert path.stat().st_size < 200_000
    assert (trace.steady_from >= 0) == (name == "train_steady")
    assert trace.meta["torch"]


def test_recorded_files_are_the_workloads() -> None:
    assert {path.stem for path in DATA.glob("*.npz")} == set(WORKLOADS)


def test_steady_trace_repeats() -> None:
    """At least 8 iterations, and more than half of the trace, are the same records."""
    trace = AllocTrace.load(DATA / "train_steady.npz")
    assert trace.meta["iterations"] >= 8
    assert trace.steady_from < trace.operations // 2
    records = records_of(trace)[trace.steady_from :]
    period = len(records) // (trace.meta["iterations"] - 1)
    assert records[period:] == records[:-period]
