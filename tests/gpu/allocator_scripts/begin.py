"""What every program of this folder begins and ends with."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vattn import _core, allocator

MIB = 1 << 20
# On a CPU, where the bridge takes CPU tensors for those of device 0.
_REHEARSED_BYTES = 512 * MIB

cuda: Any = torch.cuda  # parts of it are untyped


@contextmanager
def enabled(device: str, budget_bytes: int | None = None) -> Iterator[None]:
    """All tensors of the device come from vattn; at the end its invariants hold.

    Args:
        device: ``cuda``, or ``cpu`` for a rehearsal.
        budget_bytes: of physical memory; None for most of a GPU's.
    """
    if device == "cuda":
        allocator.enable(budget_bytes=budget_bytes)
        yield
    else:
        from tests.torch_bridge.world import world

        with world("host", budget_bytes=budget_bytes or _REHEARSED_BYTES):
            yield
    check(device)


def check(device: str) -> None:
    """No rule was broken so far: no error of a kernel, no refused free, all invariants hold."""
    settle(device)
    core().check()
    errors = _core.torch_entry_errors()
    assert not any(errors.values()), errors


def settle(device: str) -> None:
    """Work that was given to the device is done, and what it used is free."""
    gc.collect()
    if device == "cuda":
        cuda.synchronize()
    core().settle()


def core() -> _core.CachingAllocator:
    """The allocator of device 0."""
    found = _core.torch_allocator(0)
    assert found is not None, "nothing was allocated from vattn"
    return found


def block(nbytes: int, device: str) -> torch.Tensor:
    """A tensor of so many bytes, as they come."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def filled(nbytes: int, value: int, device: str) -> torch.Tensor:
    """A tensor of so many bytes, all of this value."""
    return torch.full((nbytes,), value, dtype=torch.uint8, device=device)


def holds(tensor: torch.Tensor, value: int) -> bool:
    """Whether all bytes have this value."""
    return bool((tensor == value).all())


def raised_by(work: Callable[[], object]) -> Exception:
    """What ``work`` raises, without the frames that would keep its tensors alive."""
    try:
        work()
    except Exception as error:
        return error.with_traceback(None)
    raise AssertionError("nothing was raised")


def fill_up(nbytes: int, device: str) -> list[torch.Tensor]:
    """Blocks of so many bytes, until there is no memory for another."""
    held = []
    try:
        while True:
            held.append(block(nbytes, device))
    except torch.OutOfMemoryError:
        return held


def main(*scenarios: Callable[..., None]) -> None:
    """Runs the one that the command line names, with what follows it."""
    {each.__name__: each for each in scenarios}[sys.argv[1]](*sys.argv[2:])
