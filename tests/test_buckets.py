"""Which shapes of decode steps get a graph, and which graph a step takes."""

from __future__ import annotations

import pytest

from vattn.engine import buckets
from vattn.engine.buckets import Buckets, capture_sizes, full_rows, length_buckets


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (60, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 60)),
        (100, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100)),
    ],
)
def test_capture_sizes(most: int, wanted: tuple[int, ...]) -> None:
    assert capture_sizes(most) == wanted


def test_length_buckets() -> None:
    assert length_buckets(500) == (500,)
    assert length_buckets(1024) == (1024,)
    assert length_buckets(1025) == (1024, 1025)
    assert length_buckets(131072) == (1024, 4096, 16384, 65536, 131072)


def test_every_step_fits_into_the_smallest_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_SHORTEST", 32)
    found = Buckets(20, 100)
    everything = list(found)
    assert {bucket.longest for bucket in everything} == {32, 100}
    assert len(everything) == len(set(everything)) == len(found)
    assert everything == sorted(everything, reverse=True)
    for rows in range(1, 22):
        for longest in range(1, 102):
            fitting = [b for b in everything if b.rows >= rows and b.longest >= longest]
            assert found.find(rows, longest) == min(fitting, default=None)


@pytest.mark.parametrize("sizes", [[], [0, 2], [2, 21]])
def test_bad_capture_sizes(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="max_num_seqs=20"):
        Buckets(20, 100, sizes)


def test_full_steps_have_one_length() -> None:
    found = Buckets(32, 5000, [1, 8, 32], full_rows=27)
    assert list(found) == [
        (32, 5000),
        (8, 5000),
        (8, 4096),
        (8, 1024),
        (1, 5000),
        (1, 4096),
        (1, 1024),
    ]
    assert len(found) == 7
    assert found.find(9, 100) == (32, 5000)
    assert found.find(8, 100) == (8, 1024)
    assert found.find(9, 5001) is None


def test_rows_that_fill_a_gpu() -> None:
    assert full_rows(8, 132) == 27
    assert full_rows(1, 132) == 212
