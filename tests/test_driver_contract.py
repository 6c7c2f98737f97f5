"""The contract of csrc/driver.h, on every driver: same results, same types of errors.

This file is about memory; `test_driver_contract_work.py` about copies, streams, threads and forks.
What only the cuda driver promises is in `test_cuda_driver.py` and `test_cuda_faults.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from vattn import DriverError, OutOfPages

if TYPE_CHECKING:
    from tests.drivers import Area, Memory
    from vattn._core import Driver

OPS = (
    *("reserve", "release", "create", "destroy", "map"),
    *("set_access", "unmap", "copy", "fill", "event"),
)


def pattern(i: int, nbytes: int) -> bytes:
    return bytes([i + 1]) * nbytes


# What a driver says of itself.


def test_description(driver: Driver, driver_kind: str) -> None:
    granularity = driver.granularity()
    assert driver.name() == ("cuda:0" if "cuda" in driver_kind else "host")
    assert granularity >= 4096
    assert granularity & (granularity - 1) == 0
    assert driver.default_page_bytes() % granularity == 0
    assert driver.dlpack_device() == ((2, 0) if driver_kind == "cuda" else (1, 0))
    assert driver.usable()
    free, total = driver.memory_info()
    assert 0 < free <= total


def test_counters_count_calls(driver: Driver, area: Area) -> None:
    area.map(0, area.pages[:2])
    driver.fill(area.base, 1, 100)
    counters = driver.counters()
    assert tuple(counters) == OPS
    for op in ("reserve", "create", "map", "fill"):
        calls, ns = counters[op]
        assert calls >= 1, op
        assert ns > 0, op
    assert counters["unmap"] == (0, 0)


# Reserve.


@pytest.mark.parametrize("granules", [1, 4, 1024])
def test_reserve_is_aligned_and_takes_no_memory(driver: Driver, granules: int) -> None:
    alignment = granules * driver.granularity()
    size = 3 * driver.granularity()
    bases = [driver.reserve(size, alignment) for _ in range(3)]
    assert all(base % alignment == 0 for base in bases)
    assert len(set(bases)) == 3
    assert driver.physical_bytes() == 0
    for base in bases:
        driver.release(base, size)


def test_reserve_more_than_there_is_memory(driver: Driver) -> None:
    size = 1 << 40
    base = driver.reserve(size, driver.granularity())
    assert driver.physical_bytes() == 0
    driver.release(base, size)


def test_reserve_beyond_the_address_space(driver: Driver, driver_kind: str) -> None:
    # Real CUDA calls this an invalid value; here it is the addresses that run out.
    expected = (OutOfPages, DriverError) if driver_kind == "cuda" else OutOfPages
    with pytest.raises(expected):
        driver.reserve(1 << 60, driver.granularity())


@pytest.mark.parametrize(
    ("granules", "align_granules", "named"),
    [
        (0, 1, "0 bytes"),
        (1.5, 1, "multiple"),
        (1, 3, "power of two"),
        (1, 0.5, "multiple"),
        (1, 0, "0"),
    ],
)
def test_reserve_refuses(
    driver: Driver, granules: float, align_granules: float, named: str
) -> None:
    granularity = driver.granularity()
    with pytest.raises(ValueError, match=named):
        driver.reserve(int(granules * granularity), int(align_granules * granularity))


def test_negative_sizes_are_type_errors(driver: Driver) -> None:
    with pytest.raises(TypeError):
        driver.reserve(-4096, 4096)
    with pytest.raises(TypeError):
        driver.create(-1, driver.granularity())


def test_release_takes_what_reserve_gave(driver: Driver) -> None:
    page = driver.granularity()
    base = driver.reserve(4 * page, page)
    for wrong in [(base + page, 3 * page), (base, 3 * page), (base, 8 * page), (base - page, page)]:
        with pytest.raises(ValueError, match="not a reservation"):
            driver.release(*wrong)
    driver.release(base, 4 * page)
    with pytest.raises(ValueError, match="not a reservation"):
        driver.release(base, 4 * page)


def test_release_with_live_mappings(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(3, area.pages[:1])
    memory.write(area.at(3), b"still here")
    with pytest.raises(ValueError, match="mapped"):
        driver.release(area.base, area.bytes)
    assert memory.read(area.at(3), 10) == b"still here"


# Pages.


def test_memory_is_taken_and_given_back(driver: Driver, driver_kind: str) -> None:
    page = driver.default_page_bytes()
    free_before = driver.memory_info()[0]
    pages = driver.create(6, page)
    assert len(set(pages)) == 6
    assert driver.physical_bytes() == 6 * page
    if driver_kind == "cuda_fake":  # elsewhere other programs take and give, too
        assert free_before - driver.memory_info()[0] == 6 * page
    driver.destroy(pages[::2], page)
    assert driver.physical_bytes() == 3 * page
    driver.destroy(pages[1::2], page)
    assert driver.physical_bytes() == 0
    if driver_kind == "cuda_fake":
        assert driver.memory_info()[0] == free_before


def test_create_nothing(driver: Driver) -> None:
    assert driver.create(0, driver.granularity()) == []
    driver.destroy([], driver.granularity())


@pytest.mark.parametrize("granules", [0, 0.5, 1.5])
def test_page_size_off_the_granularity(driver: Driver, granules: float) -> None:
    page = int(granules * driver.granularity())
    with pytest.raises(ValueError, match=str(page)):
        driver.create(1, page)
    assert driver.physical_bytes() == 0


@pytest.mark.parametrize("granules", [1, 2, 3, 16])
def test_page_sizes(driver: Driver, memory: Memory, granules: int) -> None:
    page = granules * driver.granularity()
    base = driver.reserve(2 * page, driver.granularity())
    pages = driver.create(2, page)
    driver.map(base, pages, page)
    driver.set_access(base, 2 * page)
    memory.write(base + page - 2, b"abcd")
    assert memory.read(base + page - 2, 4) == b"abcd"
    driver.unmap(base, 2 * page)
    driver.destroy(pages, page)
    driver.release(base, 2 * page)


def test_fresh_pages(driver: Driver, memory: Memory) -> None:
    page = driver.granularity()
    base = driver.reserve(page, page)
    for _ in range(3):  # the second and third get memory that was used before
        pages = driver.create(1, page)
        driver.map(base, pages, page)
        driver.set_access(base, page)
        if driver.fresh_pages_are_zero():
            assert memory.read(base, page) == bytes(page)
        memory.write(base, b"\xaa" * page)
        driver.unmap(base, page)
        driver.destroy(pages, page)
    driver.release(base, page)


def test_destroy_of_no_page(driver: Driver) -> None:
    page = driver.granularity()
    pages = driver.create(2, page)
    driver.destroy(pages[1:], page)
    for wrong in [pages[1:], pages, [1 << 50]]:
        with pytest.raises(ValueError, match="does not exist"):
            driver.destroy(wrong, page)
    assert driver.physical_bytes() == page  # the good one of the second try is untouched
    driver.destroy(pages[:1], page)


# Map, set access, unmap.


def test_map_in_any_order(area: Area, memory: Memory) -> None:
    area.map(0, area.pages[::-1])
    for i in range(8):
        memory.write(area.at(i), pattern(i, area.page))
    for i in range(8):
        assert memory.read(area.at(i), area.page) == pattern(i, area.page)


def test_bytes_belong_to_the_page(area: Area, memory: Memory) -> None:
    area.map(0, area.pages[:3])
    for i in range(3):
        memory.write(area.at(i), pattern(i, area.page))
    area.unmap(0, 3)
    area.map(5, [area.pages[2], area.pages[0], area.pages[1]])
    for i, holder in enumerate([2, 0, 1]):
        assert memory.read(area.at(5 + i), area.page) == pattern(holder, area.page)


def test_aliases_show_one_page(driver: Driver, area: Area, memory: Memory) -> None:
    a, b = area.pages[:2]
    area.map(0, [a, b, a])
    area.map(6, [a])
    memory.write(area.at(0), b"from the first")
    assert memory.read(area.at(2), 14) == b"from the first"
    memory.write(area.at(6) + 100, b"from the last")
    assert memory.read(area.at(0) + 100, 13) == b"from the last"
    area.unmap(0, 3)
    assert memory.read(area.at(6), 14) == b"from the first"
    assert driver.physical_bytes() == 8 * area.page


def test_runs_next_to_each_other(driver: Driver, area: Area, memory: Memory) -> None:
    """Access and unmap take any whole number of mappings, however they were made."""
    for first, last in [(0, 1), (4, 8), (1, 4)]:
        driver.map(area.at(first), area.pages[first:last], area.page)
    driver.set_access(area.base, area.bytes)
    for i in range(8):
        memory.write(area.at(i), pattern(i, 16))
    area.unmap(2, 4)
    for i in (0, 1, 6, 7):
        assert memory.read(area.at(i), 16) == pattern(i, 16)
    area.map(2, area.pages[2:6])
    for i in range(8):
        assert memory.read(area.at(i), 16) == pattern(i, 16)
    area.unmap(0, 8)


def test_nothing_to_map(driver: Driver, area: Area) -> None:
    driver.map(area.base, [], area.page)
    driver.set_access(area.base, 0)
    driver.unmap(area.base, 0)


def test_access_only_where_it_was_set(
    driver: Driver, driver_kind: str, area: Area, memory: Memory
) -> None:
    if driver_kind == "cuda":
        pytest.skip("a read of what is not accessible would lose the context")
    driver.map(area.base, area.pages[:4], area.page)
    if driver_kind != "host":  # not strict: reads give zeros, for forgiving kernels
        assert not memory.accessible(area.base)
    driver.set_access(area.base, 2 * area.page)
    assert memory.accessible(area.at(2) - 1)
    if driver_kind != "host":
        assert not memory.accessible(area.at(2))
        assert not memory.accessible(area.at(4))
    area.unmap(0, 4)
    if driver_kind == "host":
        assert memory.read(area.base, 64) == bytes(64)
    else:
        assert not memory.accessible(area.base)


def test_map_outside_a_reservation(driver: Driver, area: Area) -> None:
    for at in (area.at(-1), area.at(7), area.at(8)):
        with pytest.raises(ValueError, match="not inside one reservation"):
            driver.map(at, area.pages[:2], area.page)
    area.map(7, area.pages[:1])


def test_double_map(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(2, area.pages[:2])
    memory.write(area.at(2), b"first")
    for at, n in [(2, 1), (3, 1), (0, 3), (3, 3), (1, 5)]:
        with pytest.raises(ValueError, match=r"mapped already|already mapped"):
            driver.map(area.at(at), area.pages[3 : 3 + n], area.page)
    assert memory.read(area.at(2), 5) == b"first"
    # None of the refused runs left a part of itself.
    area.map(0, area.pages[2:4])
    area.map(4, area.pages[4:8])


def test_map_of_a_page_that_is_gone(driver: Driver, area: Area, memory: Memory) -> None:
    extra = driver.create(1, area.page)
    driver.destroy(extra, area.page)
    with pytest.raises(ValueError, match="does not exist"):
        driver.map(area.base, [*area.pages[:3], *extra, area.pages[3]], area.page)
    area.map(0, area.pages)
    memory.write(area.base, b"fine")
    assert memory.read(area.base, 4) == b"fine"


def test_off_the_granularity(driver: Driver, area: Area) -> None:
    off = driver.granularity() // 2
    area.map(0, area.pages[:2])
    with pytest.raises(ValueError, match="multiple"):
        driver.map(area.at(2) + off, area.pages[2:3], area.page)
    with pytest.raises(ValueError, match="multiple"):
        driver.map(area.at(2), area.pages[2:3], area.page + off)
    for sized in (driver.destroy, partial(driver.map, area.at(2))):
        with pytest.raises(ValueError, match="page size 0"):
            sized(area.pages[2:3], 0)
    for call in (driver.set_access, driver.unmap):
        with pytest.raises(ValueError, match="multiple"):
            call(area.base + off, area.page)
        with pytest.raises(ValueError, match="multiple"):
            call(area.base, area.page + off)


@pytest.mark.parametrize("call", ["set_access", "unmap"])
@pytest.mark.parametrize(("first", "n"), [(0, 5), (1, 1), (4, 4), (7, 1), (6, 2), (-1, 2), (7, 2)])
def test_range_with_a_hole(
    driver: Driver, area: Area, memory: Memory, call: str, first: int, n: int
) -> None:
    area.map(0, area.pages[:1])
    area.map(2, area.pages[2:6])
    memory.write(area.at(2), b"kept")
    with pytest.raises(ValueError, match=r"not mapped|not inside one reservation"):
        getattr(driver, call)(area.at(first), n * area.page)
    assert memory.read(area.at(2), 4) == b"kept"
    area.unmap(2, 4)
    area.unmap(0, 1)


@pytest.mark.parametrize("call", ["set_access", "unmap"])
def test_part_of_a_page(driver: Driver, area: Area, memory: Memory, call: str) -> None:
    half = area.page // 2
    area.map(0, area.pages[:3])
    memory.write(area.at(1), pattern(1, area.page))
    for start, size in [(0, half), (half, half), (half, 2 * half), (0, 3 * half), (half, 5 * half)]:
        with pytest.raises(ValueError, match="inside a page"):
            getattr(driver, call)(area.base + start, size)
    assert memory.read(area.at(1), area.page) == pattern(1, area.page)
    area.unmap(0, 3)


def test_unmap_twice(area: Area) -> None:
    area.map(0, area.pages[:1])
    area.unmap(0, 1)
    with pytest.raises(ValueError, match="not mapped"):
        area.unmap(0, 1)
