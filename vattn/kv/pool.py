"""The physical memory of one device, as an object that caches can share."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Self

import torch

from vattn import _core
from vattn.config import env_bytes, parse_bytes, positive_int
from vattn.kv.defaults import default_page_bytes

# Share of the device's free memory that a pool may take when no budget is given. A GPU serves the
# model and little else; the host's memory belongs to everybody on it.
_DEFAULT_SHARE = {"cpu": 0.5, "cuda": 0.9}
_DLPACK_CPU = 1


@dataclass(frozen=True)
class PoolStats:
    """Physical memory of a pool, in bytes.

    ``created`` exists now; of it ``free`` is in nobody's use and ``stale`` is mapped but used by
    nobody. ``peak_created`` is the most that ever existed.
    """

    page_bytes: int
    budget_bytes: int
    created_bytes: int
    free_bytes: int
    used_bytes: int
    stale_bytes: int
    peak_created_bytes: int
    pages_created_total: int
    pages_destroyed_total: int


def parse_device(device: str | torch.device) -> torch.device:
    """A torch device that a pool can be on.

    Raises:
        ValueError: it is not a device, or neither ``cpu`` nor ``cuda``.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        parsed = None
    if parsed is None or parsed.type not in _DEFAULT_SHARE:
        raise ValueError(f"device={str(device)!r} is not supported; use cpu or cuda[:n]")
    if parsed.type == "cuda" and parsed.index is None:
        # As everywhere in PyTorch, "cuda" is the current device, whichever that is now.
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", index)
    return torch.device("cpu") if parsed.type == "cpu" else parsed


def open_driver(device: torch.device, *, strict: bool = False) -> _core.Driver:
    """The driver for a device that :func:`parse_device` let through.

    Raises:
        DriverError: no usable CUDA driver.
    """
    if device.type == "cpu":
        return _core.host_driver(strict=strict)
    return _core.cuda_driver(device=device.index or 0)


def default_budget_bytes(device: str, driver: _core.Driver) -> int:
    """``VATTN_BUDGET``, or the share of the device's free memory that a pool takes."""
    return env_bytes("VATTN_BUDGET") or int(driver.memory_info()[0] * _DEFAULT_SHARE[device])


def shared_pool(device: torch.device, **given: object) -> PagePool | None:
    """The pool that a cache without one of its own takes, if ``vattn.allocator`` is enabled.

    Args:
        device: one that :func:`parse_device` let through.
        given: settings of a pool of its own, by name; those that are None or False count as unset.

    Returns:
        None where every cache has a pool of its own.

    Raises:
        ValueError: a setting is given, and the pool is there already.
        DriverError: no usable CUDA driver.
    """
    if not _core.torch_allocator_enabled():
        return None
    allocator = _allocator_on(device)
    if allocator is None:
        return None
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name}={value!r} is for a pool of its own, but vattn.allocator.enable() has made "
                f"one for all of {device}: leave it out and give budget_bytes or page_bytes to "
                "enable(), or give pool=vattn.PagePool(...) for memory apart from PyTorch's"
            )
    return PagePool.of_allocator(allocator)


def _allocator_on(device: torch.device) -> _core.CachingAllocator | None:
    """The allocator whose memory tensors of this device can be made of."""
    for index in _core.torch_allocator_devices():
        allocator = _core.torch_allocator(index)
        if allocator is None:
            continue
        kind, number = allocator.pool.driver.dlpack_device()
        of_cpu = kind == _DLPACK_CPU
        if of_cpu == (device.type == "cpu") and (of_cpu or number == (device.index or 0)):
            return allocator
    return _core.make_torch_allocator(device.index or 0) if device.type == "cuda" else None


class PagePool:
    """The physical pages of one device: a budget, and who uses what of it.

    Args:
        device: ``"cpu"`` or ``"cuda[:n]"``.
        page_bytes: page size, a multiple of the granularity; None for the device's default
            (:mod:`vattn.kv.defaults`).
        budget_bytes: most physical memory to use, a number or text such as ``"2GiB"``; None for
            ``VATTN_BUDGET`` or else half of the host's or nine tenths of the GPU's free memory.
        ahead_bytes: pages created in the background ahead of need, up to this much. They count
            against the budget.
        strict: host only: reserved memory that is not mapped faults when touched.
        driver: a driver of one's own instead of the device's (tests).

    Raises:
        ValueError: a page size off the granularity, a budget below one page.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        page_bytes: int | None = None,
        budget_bytes: int | str | None = None,
        ahead_bytes: int = 0,
        strict: bool = False,
        driver: _core.Driver | None = None,
    ) -> None:
        self.device = parse_device(device)
        if driver is None:
            driver = open_driver(self.device, strict=strict)
        if page_bytes is None:
            page_bytes = default_page_bytes(self.device, driver)
        else:
            positive_int(page_bytes, "page_bytes")
        if ahead_bytes < 0:
            raise ValueError(f"ahead_bytes={ahead_bytes} must not be negative")
        if budget_bytes is None:
            budget_bytes = default_budget_bytes(self.device.type, driver)
        self.driver = driver
        self.core = _core.PagePool(
            driver,
            page_bytes=page_bytes,
            budget_bytes=parse_bytes(budget_bytes, "budget_bytes"),
            low_bytes=ahead_bytes // 2,
            high_bytes=ahead_bytes,
        )
        self._mapper: _core.Mapper | None = None
        if ahead_bytes:
            self.mapper  # noqa: B018  (starts the thread that creates pages)

    @classmethod
    def of_allocator(cls, allocator: _core.CachingAllocator) -> Self:
        """The pool of PyTorch's memory on a device; see :mod:`vattn.allocator`.

        Its budget is that of tensors and caches together.
        """
        pool = cls.__new__(cls)
        pool.core = allocator.pool
        pool.driver = pool.core.driver
        kind, index = pool.driver.dlpack_device()
        pool.device = torch.device("cpu") if kind == _DLPACK_CPU else torch.device("cuda", index)
        # One thread serves all who share the pool, for as long as the process lives.
        pool._mapper = allocator.mapper
        return pool

    @property
    def page_bytes(self) -> int:
        """Size of every page of this pool."""
        return self.core.page_bytes

    @property
    def mapper(self) -> _core.Mapper:
        """The background thread of this pool, started on first use."""
        if self._mapper is None:
            self._mapper = _core.Mapper(self.core)
            # Runs at interpreter exit too: the thread must not outlive what it works on.
            weakref.finalize(self, _stop, self._mapper, self.driver)
        return self._mapper

    def set_budget(self, budget_bytes: int | str) -> None:
        """Moves the budget. Free and stale pages beyond it go back to the device at once.

        Of the stale ones, those that free slots keep go last.
        What live sequences hold beyond the budget is given back as they end; until then nothing new
        can be mapped.
        """
        self.core.set_budget(parse_bytes(budget_bytes, "budget_bytes"))

    def trim(self, keep_bytes: int = 0) -> int:
        """Gives free pages beyond ``keep_bytes`` back to the device; returns the bytes given."""
        if keep_bytes < 0:
            raise ValueError(f"keep_bytes={keep_bytes} must not be negative")
        return self.core.trim(keep_bytes)

    def stats(self) -> PoolStats:
        """Figures of this moment."""
        return PoolStats(**self.core.stats())

    def driver_calls(self) -> dict[str, int]:
        """Calls of the underlying driver API so far, by kind."""
        return {op: calls for op, (calls, _) in self.driver.counters().items()}

    def check(self) -> None:
        """Verifies the pool's invariants.

        Raises:
            InvariantError: one is broken, which is a bug of vattn.
        """
        self.core.check()


def _stop(mapper: _core.Mapper, driver: _core.Driver) -> None:
    if driver.usable():  # in a forked child there is no thread to stop
        mapper.stop()
