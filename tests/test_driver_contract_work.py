"""The contract of csrc/driver.h: copies, streams and events, threads, and what a fork does."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.drivers import make_driver
from tests.fake_cuda.fake import ROOT

if TYPE_CHECKING:
    from tests.drivers import Area, Memory
    from vattn._core import Driver

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


def test_copies_to_and_from_host_memory(driver: Driver, area: Area, memory: Memory) -> None:
    area.map(0, area.pages[:3])
    pattern = bytes(i * 7 % 251 for i in range(area.page + 3001))
    host = ctypes.create_string_buffer(pattern, len(pattern))
    address, start = ctypes.addressof(host), area.at(1) - 1501  # over the edges of a page
    stream = driver.create_stream()
    before = driver.counters()["copy"][0]
    driver.copy_from_host(start, address, len(pattern), stream)
    driver.copy(area.base, start + 1, 64, stream)
    back = ctypes.create_string_buffer(len(pattern))
    driver.copy_to_host(ctypes.addressof(back) + 5, start + 3, len(pattern) - 9, stream)
    driver.synchronize(stream)
    assert driver.counters()["copy"][0] == before + 3
    assert memory.read(start, len(pattern)) == pattern
    assert memory.read(area.base, 64) == pattern[1:65]
    assert back.raw == b"\0" * 5 + pattern[3:-6] + b"\0" * 4
    driver.destroy_stream(stream)


def test_host_memory_that_is_not_there(driver: Driver, area: Area) -> None:
    area.map(0, area.pages[:1])
    driver.copy_to_host(0, area.base, 0)
    driver.copy_from_host(area.base, 0, 0)
    with pytest.raises(ValueError, match="host memory at address 0; give a buffer"):
        driver.copy_to_host(0, area.base, 1)
    with pytest.raises(ValueError, match="host memory at address 0; give a buffer"):
        driver.copy_from_host(area.base, 0, 1)


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
        lambda: driver.copy_to_host(base, base, 1), lambda: driver.copy_from_host(base, base, 1),
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
