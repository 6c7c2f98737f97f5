"""Fixtures for every test: the drivers, their bytes, and the fake CUDA library.

`driver` runs a test once on each driver: host, host_strict, cuda_fake, cuda (skipped with a reason
where there is no GPU). At the end of a test nothing that was made on them may be left: caches and
pools are closed or out of scope by then.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.drivers import (
    DRIVERS,
    Area,
    FakeMemory,
    GpuMemory,
    HostMemory,
    Memory,
    cuda_missing_reason,
    fake_library_path,
    make_driver,
)
from tests.fake_cuda.fake import FakeCuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vattn._core import Driver


# Files of half a minute and more, by what they cost.
_LONG = ("test_compiled.py", "test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a worker left with one of them at the end would be the only one busy."""
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := cuda_missing_reason()):
        pytest.skip(reason)


@pytest.fixture
def fake_cuda(request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    """The fake libcuda with default settings. At the end: no rule broken, nothing leaked."""
    fake = FakeCuda(fake_library_path())
    fake.reset()
    yield fake
    _forget_values(request)
    _collect_if(lambda: fake.leaks() != [])
    violations, leaks = fake.violations(), fake.leaks()
    fake.reset()
    assert violations == []
    assert leaks == []


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.gpu if k == "cuda" else ()) for k in DRIVERS]
)
def driver_kind(request: pytest.FixtureRequest) -> str:
    """The name of the driver in DRIVERS."""
    return str(request.param)


@pytest.fixture
def driver(driver_kind: str, request: pytest.FixtureRequest) -> Iterator[Driver]:
    """A new driver; every page made on it must be gone at the end of the test."""
    if driver_kind == "cuda_fake":
        request.getfixturevalue("fake_cuda")
    mapped_before = _host_mappings()
    driver = make_driver(driver_kind)
    yield driver
    _forget_values(request)
    _collect_if(lambda: driver.physical_bytes() > 0)
    assert driver.physical_bytes() == 0
    assert _host_mappings() <= mapped_before


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


@pytest.fixture
def memory(driver_kind: str, driver: Driver, request: pytest.FixtureRequest) -> Iterator[Memory]:
    """The bytes of `driver`'s memory."""
    if driver_kind == "cuda_fake":
        yield FakeMemory(request.getfixturevalue("fake_cuda"))
        return
    memory = GpuMemory() if driver_kind == "cuda" else HostMemory()
    yield memory
    memory.close()


def _forget_values(request: pytest.FixtureRequest) -> None:
    """Ends the fixtures' values that the test was given, drivers among them.

    A driver that outlived its test would give back the context of the next one's.
    """
    request.node.funcargs.clear()


def _collect_if(something_is_left: Callable[[], bool]) -> None:
    """Ends what only a reference cycle keeps alive. Collecting takes 0.2 s with torch loaded."""
    if something_is_left():
        gc.collect()


def _host_mappings() -> int:
    """Mappings of host pages in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:vattn ")
