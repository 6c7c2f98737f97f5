"""The fake CUDA driver for benchmarks of what happens above the driver: counts, and overlap.

What it says about time is what it was told a call costs. Nothing here is a measurement of a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.fake_cuda.fake import LIBRARY, FakeCuda
from vattn import _core

GIB = 1 << 30
DEVICE_BYTES = 1 << 44  # nothing is behind it, so it is as large as any cell needs

# What the calls cost on GPUs, in microseconds, by the figures that vAttention and others published.
PUBLISHED_US: Mapping[str, float] = {
    "cuMemCreate": 100,
    "cuMemMap": 2,
    "cuMemSetAccess": 38,
    "cuMemUnmap": 34,
}


class Left(AssertionError):
    """Something was left behind, or a rule of the driver was broken: a bug of vattn."""


@contextmanager
def fake_gpu(*, granularity: int = 2 << 20, device_bytes: int = DEVICE_BYTES) -> Iterator[FakeCuda]:
    """The fake with accounting alone: no memory is behind its pages.

    What is made on it must be out of scope when the context ends.

    Raises:
        FileNotFoundError: it is not built; the message has the command.
        Left: a leak or a broken rule at the end.
    """
    fake = FakeCuda(LIBRARY)
    fake.reset()
    fake.configure(granularity=granularity, device_bytes=device_bytes, elide=True)
    try:
        yield fake
        if fake.leaks():
            gc.collect()
        if left := fake.violations() + fake.leaks():
            raise Left(f"{len(left)} left or broken: {left[:5]}")
    finally:
        fake.reset()


def open_fake_driver() -> _core.Driver:
    """The CUDA driver on the fake; between :func:`fake_gpu`'s begin and end."""
    return _core.cuda_driver(libcuda=str(LIBRARY))


def charge(fake: FakeCuda, costs_us: Mapping[str, float]) -> None:
    """From now on each call takes this long."""
    for name, cost_us in costs_us.items():
        fake.latency(name, round(cost_us * 1000))
