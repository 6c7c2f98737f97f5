"""What the tests of the cuda driver share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vattn import DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vattn._core import Driver

PAGE = 2 << 20  # the fake's granularity by default


class Run:
    """Eight pages mapped with access."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.bytes = 8 * PAGE
        self.base = driver.reserve(self.bytes, PAGE)
        self.pages = driver.create(8, PAGE)
        driver.map(self.base, self.pages, PAGE)
        driver.set_access(self.base, self.bytes)

    def close(self) -> None:
        self.driver.unmap(self.base, self.bytes)
        self.driver.destroy(self.pages, PAGE)
        self.driver.release(self.base, self.bytes)


def failure_of(work: Callable[[], object]) -> DriverError:
    """The error that `work` raises, without the traceback that would keep its driver alive."""
    try:
        work()
    except DriverError as error:
        return error.with_traceback(None)
    raise AssertionError("nothing was raised")
