"""Fixtures of the cache's tests, for modules that name them in `pytest_plugins`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from tests.drivers import make_driver
from tests.helpers import SMALL_PAGE, make_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    import vattn
    from tests.fake_cuda.fake import FakeCuda
    from vattn import _core


@pytest.fixture
def small_pages(request: pytest.FixtureRequest) -> None:
    """Lets `driver` have pages of 4 KiB on the fake, too. Use it as a mark: it comes first then."""
    if "driver_kind" not in request.fixturenames:
        return
    if request.getfixturevalue("driver_kind") == "cuda_fake":
        request.getfixturevalue("fake_cuda").configure(granularity=SMALL_PAGE)


@pytest.fixture
def pool(driver: _core.Driver) -> vattn.PagePool:
    """A pool that is never short."""
    return make_pool(driver)


@pytest.fixture
def fake_driver(fake_cuda: FakeCuda) -> Iterator[_core.Driver]:
    """The cuda driver on the fake, with pages of 4 KiB."""
    fake_cuda.configure(granularity=SMALL_PAGE)
    driver = make_driver("cuda_fake")
    yield driver
    gc.collect()
    assert driver.physical_bytes() == 0
