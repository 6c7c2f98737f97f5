"""The contract of csrc/driver.h, on every driver: same results, same types of errors."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.drivers import make_driver
from tests.fake_cuda.fake import ROOT
from vattn import DriverError, OutOfPages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.drivers import Memory
    from vattn._core import Driver

OPS = (
    *("reserve", "release", "create", "destroy", "map"),
    *("set_access", "unmap", "copy", "fill", "event"),
)


@dataclass
class Area:
    """A reservation of eight pages and eight pages for it, both as large as two granules."""

    driver: Driver
    base: int
    pages: list[int]
    page: int  # bytes
    bytes: int

    def at(self, i: int) -> int:
        return self.base + i * self.page

    def map(self, first: int, pages: list[int]) -> None:
        """Maps with access."""
        self.driver.map(self.at(first), pages, self.page)
        self.driver.set_access(self.at(first), len(pages) * self.page)

    def unmap(self, first: int, n: int) -> None:
        self.driver.unmap(self.at(first), n * self.page)


@pytest.fixture
def area(driver: Driver) -> Iterator[Area]:
    page = 2 * driver.granularity()
    area = Area(driver, driver.reserve(8 * page, page), driver.create(8, page), page, 8 * page)
    yield area
    for i in range(8):
        try:
            area.unmap(i, 1)
        except ValueError:
            continue  # not mapped
    driver.destroy(area.pages, page)
    driver.release(area.base, area.bytes)


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
    for call in (driver.destroy, partial(driver.map, area.at(2))):
        with pytest.raises(ValueError, match="page size 0"):
            call(area.pages[2:3], 0)
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


# Copies, streams and events.


def test_fill_and_copy(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(0, area.pages[:4])
    driver.fill(area.base, 7, 2 * area.page)
    driver.fill(area.base + 3, 0, 5)
    # Odd ends, over the edge of a page on both sides.
    driver.copy(area.at(3) - 101, area.at(1) - 1001, 2003)
    driver.copy(area.at(2), area.base, 9)
    driver.synchronize()
    assert memory.read(area.base, 10) == b"\x07\x07\x07\0\0\0\0\0\x07\x07"
    assert memory.read(area.at(3) - 101, 2003) == b"\x07" * 2003
    assert memory.read(area.at(2), 9) == b"\x07\x07\x07\0\0\0\0\0\x07"


def test_copy_and_fill_of_nothing(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(0, area.pages[:1])
    memory.write(area.base, b"as it was")
    driver.copy(area.base, area.base, 0)
    driver.fill(area.base, 1, 0)
    driver.synchronize()
    assert memory.read(area.base, 9) == b"as it was"


@pytest.mark.parametrize(("dst", "src"), [(0, 0), (0, 99), (99, 0)])
def test_overlapping_copy(driver: Driver, area: Area, dst: int, src: int) -> None:
    area.map(0, area.pages[:1])
    with pytest.raises(ValueError, match="overlapping"):
        driver.copy(area.base + dst, area.base + src, 100)
    driver.copy(area.base, area.base + 100, 100)  # side by side is not overlapping
    driver.synchronize()


def test_event_follows_the_work(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(0, area.pages[:1])
    stream = driver.create_stream()
    driver.fill(area.base, 9, area.page, stream)
    event = driver.record(stream)
    driver.wait(event)
    assert driver.query(event)
    assert memory.read(area.base, area.page) == b"\x09" * area.page
    driver.destroy_event(event)
    driver.destroy_stream(stream)


def test_event_orders_streams(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(0, area.pages)
    streams = [driver.create_stream() for _ in range(8)]
    driver.fill(area.base, 5, area.page, streams[0])
    for i in range(1, 8):
        event = driver.record(streams[i - 1])
        driver.stream_wait(streams[i], event)
        driver.destroy_event(event)  # at once: what waits for it still does
        driver.copy(area.at(i), area.at(i - 1), area.page, streams[i])
    driver.synchronize(streams[7])
    assert memory.read(area.at(7), area.page) == b"\x05" * area.page
    for stream in streams:
        driver.destroy_stream(stream)


def test_no_event(driver: Driver) -> None:
    assert driver.query(0)
    driver.wait(0)
    driver.stream_wait(0, 0)
    driver.destroy_event(0)


# Threads and processes.


def test_threads_at_once(driver: Driver, memory: Memory) -> None:
    """Every call from many threads: own ranges, shared driver."""
    page = driver.granularity()
    errors: list[BaseException] = []

    def work(tag: int) -> None:
        try:
            stream = driver.create_stream()
            for round_ in range(6):
                base = driver.reserve(4 * page, page)
                pages = driver.create(3, page)
                driver.map(base, [*pages, pages[0]], page)
                driver.set_access(base, 4 * page)
                value = 16 * tag + round_
                driver.fill(base, value, page, stream)
                driver.copy(base + page, base, page, stream)
                event = driver.record(stream)
                driver.wait(event)
                driver.destroy_event(event)
                for i in (0, 1, 3):
                    assert memory.read(base + i * page, 64) == bytes([value]) * 64
                driver.unmap(base, 4 * page)
                driver.destroy(pages, page)
                driver.release(base, 4 * page)
            driver.destroy_stream(stream)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


FORK = """
import os, sys, threading
from tests.drivers import make_driver
from vattn import DriverError

driver = make_driver(sys.argv[1])
page = driver.granularity()
base, pages = driver.reserve(page, page), driver.create(1, page)
driver.map(base, pages, page)
driver.set_access(base, page)
driver.fill(base, 3, page)
event = driver.record(0)

def child():
    global driver
    assert not driver.usable()
    calls = [
        lambda: driver.reserve(page, page), lambda: driver.release(base, page),
        lambda: driver.create(1, page), lambda: driver.destroy(pages, page),
        lambda: driver.map(base, pages, page), lambda: driver.set_access(base, page),
        lambda: driver.unmap(base, page), lambda: driver.copy(base, base + 64, 64),
        lambda: driver.fill(base, 1, 1), lambda: driver.record(0), lambda: driver.query(event),
        lambda: driver.wait(event), lambda: driver.stream_wait(0, event),
    ]
    for i, call in enumerate(calls):
        try:
            call()
        except DriverError as error:
            assert "fork" in str(error) and error.fatal, error
        else:
            raise AssertionError(f"call {i} did not raise")
    driver.destroy_event(event)
    driver = None  # the destructor must leave the parent's memory and device alone

pid = os.fork()
if pid == 0:
    try:
        child()
    except BaseException as error:
        print("child:", repr(error), flush=True)
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
driver.wait(event)
driver.copy(base + page // 2, base, 64)
driver.synchronize()
driver.destroy_event(event)
driver.unmap(base, page)
driver.destroy(pages, page)
driver.release(base, page)
print("parent is fine")
"""


def test_child_of_a_fork_is_refused(driver_kind: str) -> None:
    make_driver(driver_kind)  # fails here, with its own message, if it cannot be made at all
    result = subprocess.run(
        [sys.executable, "-c", FORK, driver_kind],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "parent is fine" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0, result.stderr
