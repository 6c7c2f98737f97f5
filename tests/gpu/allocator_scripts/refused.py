"""What enable() cannot do says so, and what it should not be asked."""

from __future__ import annotations

import torch

from tests.gpu.allocator_scripts.begin import MIB, cuda, enabled, filled, holds, main, raised_by
from vattn import allocator


def too_late(device: str) -> None:
    """After CUDA's start only a pool is possible, and the error says so."""
    keep = torch.ones(1000, device=device)
    error = raised_by(allocator.enable)
    assert isinstance(error, RuntimeError), repr(error)
    assert "vattn.allocator.pool()" in str(error), error
    assert not allocator.is_enabled()
    with allocator.pool(tag="late"):
        there = filled(64 * MIB, 9, device)
    assert allocator.stats().peak_live_bytes >= 64 * MIB
    beside = filled(64 * MIB, 8, device)
    assert allocator.stats().live_bytes < 128 * MIB, "this one is PyTorch's own"
    assert holds(there, 9)
    assert holds(beside, 8)
    assert cuda.memory_allocated() >= 128 * MIB, "PyTorch's figures have both"
    assert float(keep.sum()) == 1000


def twice(device: str) -> None:
    with enabled(device):
        torch.ones(1, device=device)
        for work, words in ((allocator.enable, "already"), (allocator.disable, "by now")):
            error = raised_by(work)
            assert isinstance(error, RuntimeError), repr(error)
            assert words in str(error), error


def undone(device: str) -> None:
    """disable() before CUDA's start leaves PyTorch's own allocator, figures and all."""
    allocator.enable()
    allocator.disable()
    assert cuda.memory.get_allocator_backend() != "pluggable"
    there = filled(64 * MIB, 5, device)
    assert holds(there, 5)
    assert cuda.memory_reserved() >= cuda.memory_allocated() >= 64 * MIB
    pool = cuda.MemPool()
    with cuda.use_mem_pool(pool):
        inside = filled(4 * MIB, 6, device)
    assert holds(inside, 6)
    del inside


def mem_pool(device: str) -> None:
    with enabled(device):
        torch.ones(1, device=device)
        for work in (cuda.MemPool, cuda.memory.MemPool, lambda: cuda.use_mem_pool(None)):
            error = raised_by(work)
            assert isinstance(error, RuntimeError), repr(error)
            assert "vattn.allocator.pool(tag=...)" in str(error), error


def graph_trees(device: str) -> None:
    """What mode="reduce-overhead" is made of, without a compiler for kernels."""
    with enabled(device):
        compiled = torch.compile(lambda x: torch.relu(x * 2) + 1, backend="cudagraphs")
        given = torch.ones(1024, device=device)

        def run() -> None:
            for _ in range(4):  # warm up, record, replay
                compiled(given)

        error = raised_by(run)
        assert "reduce-overhead" in str(error), repr(error)
        plain = torch.compile(lambda x: torch.relu(x * 2) + 1, backend="aot_eager")
        assert bool((plain(given) == 3).all())


if __name__ == "__main__":
    main(too_late, twice, undone, mem_pool, graph_trees)
