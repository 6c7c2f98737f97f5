"""A process whose CPU tensors come from vattn's allocator, on a driver of one's choice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tests.drivers import fake_library_path, make_driver
from tests.fake_cuda.fake import FakeCuda
from tests.torch_bridge import Bridge, TorchError
from vattn import _core

MIB = 1 << 20
PAGE = 2 * MIB


@dataclass
class World:
    """What a scenario works with."""

    kind: str
    bridge: Bridge
    allocator: _core.CachingAllocator
    fake: FakeCuda | None

    @property
    def pool(self) -> _core.PagePool:
        return self.allocator.pool

    def live_bytes(self) -> int:
        return int(self.allocator.figures()["all"]["allocated_bytes"]["current"])

    def check(self) -> None:
        """Invariants hold, and nobody broke a rule of the driver."""
        self.allocator.settle()
        self.allocator.check()
        if self.fake is not None:
            assert self.fake.violations() == []


@contextmanager
def world(kind: str = "cuda_fake", budget_bytes: int = 512 * MIB) -> Iterator[World]:
    """Tensors made inside come from the allocator of device 0."""
    fake = None
    if kind == "cuda_fake":
        fake = FakeCuda(fake_library_path())
        fake.configure(device_bytes=4 * budget_bytes, granularity=PAGE)
    pool = _core.PagePool(make_driver(kind), page_bytes=PAGE, budget_bytes=budget_bytes)
    allocator = _core.CachingAllocator(pool, _core.Mapper(pool))
    _core.configure_torch_allocator(enabled=True)
    _core.install_allocator(0, allocator)
    here = World(kind, Bridge(), allocator, fake)
    here.bridge.install()
    try:
        yield here
    finally:
        here.bridge.remove()
    here.check()


def block(nbytes: int) -> torch.Tensor:
    """A tensor of so many bytes, as they come."""
    return torch.empty(nbytes, dtype=torch.uint8)


def error_of(work: Callable[[], object]) -> TorchError:
    """What an entry point throws."""
    try:
        work()
    except TorchError as error:
        return error
    raise AssertionError("nothing was thrown")


def raised_by(work: Callable[[], object]) -> Exception:
    """What `work` raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def main(*scenarios: Callable[[str], None]) -> None:
    """Runs the one that the command line names, on the driver that it names."""
    {each.__name__: each for each in scenarios}[sys.argv[1]](sys.argv[2])
