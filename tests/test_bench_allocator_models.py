"""The models of other allocators on hand-computed cases, and against a second opinion."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.allocator_native import Replay
from tests.alloc_records import MIB, Run, random_records, release, request, runner
from tests.torch_caching_model import TorchCachingModel


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(Replay.find(), tmp_path)


# PyTorch's default policy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "physical"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # the largest small one
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to 512 it is 10 MiB
        (12 * MIB, 12 * MIB),
        (12 * MIB + 1, 14 * MIB),
    ],
)
def test_native_segment(run: Run, size: int, physical: int) -> None:
    found = run("native", [(0, 0, size)])
    assert found["peak_physical_bytes"] == physical
    assert found["calls"] == {"cudaMalloc": 1}
    assert found["peak_live_bytes"] == found["live_at_end"] == -(-size // 512) * 512


def test_native_splits_and_merges(run: Run) -> None:
    """9 + 9 + 2 MiB fill one segment; free neighbours become 20 MiB again, whatever the order."""
    fill = [request(0, 9), request(1, 9), request(2, 2)]
    assert run("native", fill)["calls"] == {"cudaMalloc": 1}
    again = [*fill, *release(0, 2, 1), request(3, 20)]
    assert run("native", again)["calls"] == {"cudaMalloc": 1}
    apart = [*fill, *release(0, 2), request(3, 11)]  # 9 and 2 are no neighbours
    assert run("native", apart)["calls"] == {"cudaMalloc": 2}


def test_native_takes_the_smallest_that_fits(run: Run) -> None:
    """Of free blocks of 30 and 12 MiB the latter serves 11, so that 30 is still there."""
    sized = [request(0, 30), request(1, 12), *release(0, 1), request(2, 11), request(3, 30)]
    assert run("native", sized)["calls"] == {"cudaMalloc": 2}


def test_native_small_blocks_are_packed_at_512(run: Run) -> None:
    small = [(i, 0, 1) for i in range(4096)]
    assert run("native", small)["calls"] == {"cudaMalloc": 1}
    assert run("native", [*small, (4096, 0, 1)])["calls"] == {"cudaMalloc": 2}


@pytest.mark.parametrize(("policy", "call"), [("native", "cudaMalloc"), ("expandable", "cuMemMap")])
def test_streams_do_not_share(run: Run, policy: str, call: str) -> None:
    same = [request(0, 12), *release(0), request(1, 12)]
    other = [request(0, 12), *release(0), request(1, 12, stream=7)]
    assert run(policy, same)["calls"][call] == 1
    assert run(policy, other)["calls"][call] == 2


def test_native_gives_whole_segments_back_when_out_of_memory(run: Run) -> None:
    found = run("native", [request(0, 12), *release(0), request(1, 30)], device=40 * MIB)
    assert found["calls"] == {"cudaMalloc": 3, "cudaFree": 1}  # the second cudaMalloc fails
    assert found["out_of_memory_at"] is None
    split = run("native", [request(0, 2), request(1, 22)], device=40 * MIB)
    assert split["out_of_memory_at"] == 1
    assert split["ns_per_op"] is None


# Expandable segments ------------------------------------------------------------------------------


def test_expandable_grows_in_place(run: Run) -> None:
    two = [request(0, 12), request(1, 12)]  # the second starts in the first page of 20 MiB
    calls = {"cuMemAddressReserve": 1, "cuMemCreate": 2, "cuMemMap": 2, "cuMemSetAccess": 2}
    found = run("expandable", two)
    assert found["peak_physical_bytes"] == 40 * MIB
    assert found["calls"] == calls
    whole = run("expandable", [*two, *release(0, 1), request(2, 40)])
    assert whole["calls"] == calls
    more = run("expandable", [*two, *release(0, 1), request(2, 41)])
    assert more["peak_physical_bytes"] == 60 * MIB
    assert more["calls"]["cuMemCreate"] == 3


def test_expandable_maps_a_run_with_one_access_call(run: Run) -> None:
    found = run("expandable", [request(0, 100), request(1, 0.5)])
    assert found["calls"] == {
        "cuMemAddressReserve": 2,  # large and small blocks
        "cuMemCreate": 6,
        "cuMemMap": 6,
        "cuMemSetAccess": 2,
    }
    assert found["peak_physical_bytes"] == 102 * MIB


def test_expandable_splits_what_native_does_not(run: Run) -> None:
    """Of 12 + 7.5 MiB in a page of 20, half a MiB is left: the next page adds to it."""
    found = run("expandable", [request(0, 12), request(1, 7.5), request(2, 20.5)])
    assert found["peak_physical_bytes"] == 40 * MIB


def test_expandable_unmaps_whole_pages_when_out_of_memory(run: Run) -> None:
    """3 x 12 MiB take two pages; with the first 24 free, one page goes, and stream 1 gets two."""
    three = [request(0, 12), request(1, 12), request(2, 12)]
    found = run("expandable", [*three, *release(0, 1), request(3, 30, 1)], device=60 * MIB)
    assert found["out_of_memory_at"] is None
    assert found["calls"] == {
        "cuMemAddressReserve": 2,
        "cuMemCreate": 2 + 2 + 2,  # of the first try, one fails
        "cuMemRelease": 1 + 1,
        "cuMemMap": 4,
        "cuMemSetAccess": 3,
        "cuStreamSynchronize": 1,
        "cuMemUnmap": 1,
    }
    partly = run("expandable", [*three, *release(0), request(3, 30, 1)], device=60 * MIB)
    assert partly["out_of_memory_at"] == 4


# No caching ---------------------------------------------------------------------------------------


def test_direct_packs_small_ones_and_keeps_nothing(run: Run) -> None:
    pair = [request(0, 3), *release(0)]
    found = run("direct", [*pair, *pair, (1, 0, 100), (2, 5, 100), *release(1, 2)])
    assert found["calls"] == {"cudaMalloc": 4, "cudaFree": 4}
    assert found["peak_physical_bytes"] == 4 * MIB
    assert found["driver_calls_second_half"] == 4
    small = run("direct", [request(0, 1), request(1, 1), request(2, 1)])
    assert small["peak_physical_bytes"] == 4 * MIB
    again = run("direct", [request(0, 1), *release(0), request(1, 1)])
    assert again["peak_physical_bytes"] == 2 * MIB


def test_modelled_time_is_calls_at_published_costs(run: Run) -> None:
    assert run("native", [request(0, 12)])["modelled_driver_ms"] == pytest.approx(0.140)
    found = run("expandable", [request(0, 12), request(1, 12)])
    assert found["modelled_driver_ms"] == pytest.approx(0.280)


# Against a second opinion -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["native", "expandable"])
@pytest.mark.parametrize("seed", range(8))
def test_second_opinion(run: Run, policy: str, seed: int) -> None:
    """Random programs on devices that are often full: calls, peaks and failures are the same."""
    rng = random.Random(seed)
    records = random_records(rng, 600, largest=(21, 24.5, 26)[seed % 3])
    device = (100, 200, 300)[seed % 3] * MIB + seed
    model = TorchCachingModel(device, expandable=policy == "expandable")
    addresses: dict[int, int] = {}
    failed = None
    for i, (block, stream, size) in enumerate(records):
        if size == 0:
            model.free(addresses.pop(block))
            continue
        try:
            addresses[block] = model.allocate(size, stream)
        except MemoryError:
            failed = i
            break
    found = run(policy, records, device)
    assert found["out_of_memory_at"] == failed
    assert found["calls"] == model.calls
    assert found["peak_physical_bytes"] == model.peak
