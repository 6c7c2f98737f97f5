"""Fixtures of the allocator's tests, for modules that name them in `pytest_plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.allocator_model import PAGE, Allocator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.drivers import Memory
    from vattn import _core


@pytest.fixture
def allocator_pages(request: pytest.FixtureRequest) -> None:
    """Lets `driver` have pages of PAGE bytes on the fake. Use it as a mark: it comes first then."""
    if "driver_kind" not in request.fixturenames:
        return
    if request.getfixturevalue("driver_kind") == "cuda_fake":
        request.getfixturevalue("fake_cuda").configure(granularity=PAGE)


@pytest.fixture
def allocator(driver: _core.Driver, memory: Memory) -> Iterator[Allocator]:
    """An allocator of 512 pages; nothing may be left of it."""
    made = Allocator(driver, memory, pages=512)
    yield made
    made.end()
