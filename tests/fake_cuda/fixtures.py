"""What the tests of the fake share. A test module loads it by naming it in `pytest_plugins`."""

from collections.abc import Iterator

import pytest

from tests.fake_cuda.driver import DEVICE_BYTES, PAGE, Driver
from tests.fake_cuda.fake import BUILD_COMMAND, LIBRARY, FakeCuda


@pytest.fixture(scope="session")
def fake_library() -> FakeCuda:
    if not LIBRARY.exists():
        pytest.fail(f"{LIBRARY} is not built; run `{BUILD_COMMAND}`")
    return FakeCuda(LIBRARY)


@pytest.fixture
def fake(fake_library: FakeCuda) -> Iterator[FakeCuda]:
    """The fake, fresh and with small pages; cuInit is not called."""
    fake_library.reset()
    fake_library.configure(granularity=PAGE, device_bytes=DEVICE_BYTES, watchdog_ms=5000)
    yield fake_library
    fake_library.reset()


@pytest.fixture
def drv(fake: FakeCuda) -> Driver:
    """Driver calls, with device 0's context current."""
    driver = Driver(fake)
    driver.start()
    return driver
