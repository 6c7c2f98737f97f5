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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := cuda_missing_reason()):
        pytest.skip(reason)


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """The fake libcuda with default settings. Asserts that no rule was broken and nothing leaked.

    What a cuda driver holds while it lives (the context, events for reuse) is no leak here.
    """
    fake = FakeCuda(fake_library_path())
    fake.reset()
    yield fake
    _collect_if(lambda: bool(_leaks(fake)))
    violations, leaks = fake.violations(), _leaks(fake)
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
    _collect_if(lambda: driver.physical_bytes() > 0)
    assert driver.physical_bytes() == 0
    assert _host_mappings() <= mapped_before


@pytest.fixture
def memory(driver_kind: str, driver: Driver, request: pytest.FixtureRequest) -> Iterator[Memory]:
    """The bytes of `driver`'s memory."""
    if driver_kind == "cuda_fake":
        yield FakeMemory(request.getfixturevalue("fake_cuda"))
        return
    memory = GpuMemory() if driver_kind == "cuda" else HostMemory()
    yield memory
    memory.close()


def _leaks(fake: FakeCuda) -> list[str]:
    held_by_drivers = ("context of device", "events")
    return [line for line in fake.leaks() if not any(held in line for held in held_by_drivers)]


def _collect_if(something_is_left: Callable[[], bool]) -> None:
    """Ends what only a reference cycle keeps alive. Collecting takes 0.2 s with torch loaded."""
    if something_is_left():
        gc.collect()


def _host_mappings() -> int:
    """Mappings of host pages in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:vattn")
