"""Pausing, running out, limits and figures, under enable()."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from tests.gpu.allocator_scripts.begin import (
    MIB,
    block,
    check,
    core,
    cuda,
    enabled,
    fill_up,
    filled,
    holds,
    main,
    raised_by,
    settle,
)
from vattn import allocator


def free_bytes(device: str) -> int:
    """What the driver says is free; in a rehearsal what the pool has not taken."""
    if device == "cuda":
        return int(cuda.mem_get_info()[0])
    stats = allocator.stats(0)
    return stats.budget_bytes - stats.pool_bytes


def pause(device: str) -> None:
    """A tag's physical memory goes to the driver and comes back; with a backup, contents do too."""
    unit = 64 * MIB if device == "cuda" else 8 * MIB
    with enabled(device):
        with allocator.pool("weights"):
            weights = [filled(unit + i * 4096, i + 1, device) for i in range(12)]
            small = torch.arange(1000, device=device)
        other = filled(unit, 99, device)
        places = [w.data_ptr() for w in weights]
        size = sum(w.nbytes for w in weights)
        settle(device)
        allocator.trim()
        before = free_bytes(device)
        allocator.pause("weights")
        allocator.trim()
        away = free_bytes(device)
        assert away - before >= size, f"{away - before} of {size} bytes came free"
        assert allocator.is_paused("weights")
        again = [filled(unit, 50 + i, device) for i in range(6)]  # in the memory that is free now
        assert holds(other, 99)
        assert all(holds(t, 50 + i) for i, t in enumerate(again))
        del again
        allocator.resume("weights")
        settle(device)
        assert [w.data_ptr() for w in weights] == places
        assert all(holds(w, i + 1) for i, w in enumerate(weights))
        assert small.tolist() == list(range(1000))
        allocator.trim()
        back = free_bytes(device)
        assert before - 16 * MIB <= back <= away - size, (before, away, back)
        # On all paths to the host and back: pageable memory, and none.
        allocator.pause("weights", pinned=False)
        allocator.resume("weights")
        assert all(holds(w, i + 1) for i, w in enumerate(weights))
        allocator.pause("weights", backup=False)
        allocator.trim()
        assert free_bytes(device) - before >= size
        allocator.resume("weights")
        assert [w.data_ptr() for w in weights] == places
        for i, w in enumerate(weights):
            w.fill_(i + 100)
        assert all(holds(w, i + 100) for i, w in enumerate(weights))
        del weights, small, w
        settle(device)
        allocator.trim()
        assert free_bytes(device) - before >= size - 16 * MIB


def out_of_memory(device: str) -> None:
    """torch.OutOfMemoryError by type, with who holds the memory; the program goes on."""
    budget = 2048 * MIB if device == "cuda" else 128 * MIB
    part = budget // 8
    with enabled(device, budget):
        with allocator.pool("weights"):
            weights = filled(2 * part, 7, device)
        held = [block(part, device) for _ in range(4)]
        try:
            torch.zeros(4 * part, dtype=torch.uint8, device=device)
            raise AssertionError("there was no memory for this")
        except torch.OutOfMemoryError as error:
            message = str(error)
        assert "out of memory" in message, message
        assert "weights" in message, message
        assert core().figures()["num_ooms"] == 1
        held.pop()
        assert holds(torch.zeros(part, dtype=torch.uint8, device=device), 0)
        held.clear()
        assert int(filled(4 * part, 1, device).min()) == 1
        # It comes out of C++ in a backward pass, which on a GPU is a thread of autograd's.
        x = torch.ones(part // 4, device=device, requires_grad=True)
        y = (x * 2).exp()
        filler = fill_up(part // 4, device)
        backward = raised_by(functools.partial(differentiate, y))
        assert isinstance(backward, torch.OutOfMemoryError), repr(backward)
        filler.clear()
        del y
        differentiate(x * 3)
        assert x.grad is not None
        assert float(x.grad[0]) == 3.0
        # Once more and more: nothing is lost by an error.
        for _ in range(50):
            assert isinstance(raised_by(lambda: block(2 * budget, device)), torch.OutOfMemoryError)
        huge = raised_by(lambda: block(1 << 50, device))
        assert isinstance(huge, torch.OutOfMemoryError), repr(huge)
        assert holds(weights, 7)
        check(device)
        del x
        settle(device)
        assert int(filled(5 * part, 1, device).min()) == 1


def differentiate(y: torch.Tensor) -> None:
    torch.autograd.backward(y.sum())


def fraction(device: str) -> None:
    """torch.cuda.set_per_process_memory_fraction bounds it, until it is 1 again."""
    with enabled(device):
        cuda.set_per_process_memory_fraction(0.02)
        total = cuda.mem_get_info()[1]
        assert abs(cuda.get_per_process_memory_fraction() - 0.02) < 1e-3
        keep = filled(int(0.01 * total), 3, device)
        error = raised_by(lambda: block(int(0.015 * total), device))
        assert isinstance(error, torch.OutOfMemoryError), repr(error)
        cuda.set_per_process_memory_fraction(1.0)
        more = block(int(0.015 * total), device)
        assert holds(keep, 3)
        del keep, more


def figures(device: str, way: str) -> None:
    """Prints what torch.cuda.memory_* say of one program; ``way`` is native or enable."""
    if way == "enable":
        with enabled(device):
            found = measured(device)
    else:
        found = measured(device)
    print(json.dumps(found), flush=True)


def measured(device: str) -> dict[str, Any]:
    """Figures at a few points of a program of all sizes."""
    torch.manual_seed(0)
    cuda.init()
    points = [figures_now()]
    keep = [torch.randn(n, device=device) for n in (1, 127, 128, 5000, 300_000, 4_000_000)]
    points.append(figures_now())
    for i in range(40):
        x = torch.randn(100 + 37 * i, 1024, device=device)
        y = torch.relu(x * 2).sum(dim=1)
        del x
        if i % 5 == 0:
            keep.append(y)
    points.append(figures_now())
    a = torch.randn(512, 512, device=device)
    keep.append(a @ a)  # and cuBLAS's workspace
    del a, y
    points.append(figures_now())
    cuda.reset_peak_memory_stats()
    cuda.reset_accumulated_memory_stats()
    points.append(figures_now())
    assert cuda.max_memory_allocated() == cuda.memory_allocated()
    keep.clear()
    summary = cuda.memory_summary()
    segments = cuda.memory_snapshot()
    reserved = cuda.memory_reserved()
    cuda.synchronize()
    cuda.empty_cache()
    points.append(figures_now())
    return {
        "points": points,
        "keys": sorted(cuda.memory_stats()),
        "summary": summary.splitlines()[1].strip(" |"),
        "segment_keys": sorted({key for segment in segments for key in segment}),
        "given_back": reserved - cuda.memory_reserved(),
    }


def figures_now() -> dict[str, int]:
    stats = cuda.memory_stats()
    names = ("allocation.all", "requested_bytes.all", "allocated_bytes.all", "reserved_bytes.all")
    kinds = ("current", "peak", "allocated", "freed")
    return {f"{name}.{kind}": int(stats[f"{name}.{kind}"]) for name in names for kind in kinds} | {
        "memory_allocated": cuda.memory_allocated(),
        "max_memory_allocated": cuda.max_memory_allocated(),
        "memory_reserved": cuda.memory_reserved(),
    }


if __name__ == "__main__":
    main(pause, out_of_memory, fraction, figures)
