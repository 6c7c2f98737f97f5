"""One process of bench.allocator_gpu: all its programs, with memory from one place.

    python -m bench.allocator_gpu_child --way vattn --json FILE [--traces DIR]

What PyTorch's own allocator does is chosen before it starts, by its environment; that it took
effect is checked. With ``--traces`` a recorded program is run at the end: under PyTorch's
allocator its history goes to ``DIR/<way>.npz``, under vattn it only runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.alloc_traces.cuda_source import CudaMarks, record_cuda
from bench.alloc_traces.training import TRAINING
from bench.allocator_gpu_programs import (
    PAIR_BYTES,
    SIZES,
    Memory,
    Size,
    cuda,
    fragments,
    pair,
    train,
)
from bench.common import Json

WAYS = ("native", "expandable", "vattn")
# Of our driver, to manage memory.
_CALLS = ("reserve", "release", "create", "destroy", "map", "set_access", "unmap")
RECORDED = TRAINING[0]  # of varying lengths


def begin(way: str, device: torch.device) -> Callable[[], int]:
    """Puts the allocator in charge; returns what counts its driver calls.

    Raises:
        RuntimeError: another one is in charge than was asked for.
    """
    if device.type != "cuda":
        return lambda: 0
    if way == "vattn":
        from vattn import _core, allocator

        allocator.enable()
        torch.ones(1, device=device)

        def calls() -> int:
            made = _core.torch_allocator(0)
            assert made is not None
            counters = made.pool.driver.counters()
            return sum(counters[kind][0] for kind in _CALLS)

        return calls
    torch.ones(1, device=device)
    expandable = any(segment["is_expandable"] for segment in cuda.memory_snapshot())
    if expandable != (way == "expandable"):
        raise RuntimeError(f"expandable segments are {expandable}, which is not {way}")

    def counted() -> int:
        stats = cuda.memory_stats()
        return int(stats["num_device_alloc"] + stats["num_device_free"])

    return counted


def warm_up(size: Size, device: torch.device, memory: Memory) -> None:
    """Libraries are loaded, and what they keep is not a part's."""
    small = replace(size, layers=1, longest=64, steps=4)
    train(small, device, memory)


def recorded(way: str, device: torch.device, traces: Path) -> Json:
    """Runs the recorded program; its peaks, by the allocator's own figures.

    ``reserved_before_bytes`` is memory that the recording does not know of.
    """
    clear: Any = torch._C
    clear._cuda_clearCublasWorkspaces()
    cuda.synchronize()
    cuda.empty_cache()
    before = int(cuda.memory_reserved())
    cuda.reset_peak_memory_stats()
    if way == "vattn":
        marks = CudaMarks(device)
        kept = RECORDED.program(device, marks)
        marks.close()
    else:
        kept = record_cuda(RECORDED.name, RECORDED.program, {}, device)
        kept.save(traces / f"{way}.npz")
    stats = cuda.memory_stats()
    del kept
    return {
        "reserved_before_bytes": before,
        "peak_reserved_bytes": int(stats["reserved_bytes.all.peak"]),
        "peak_allocated_bytes": int(stats["allocated_bytes.all.peak"]),
    }


def run(way: str, device: torch.device, traces: Path | None) -> Json:
    """Everything that one process measures."""
    size = SIZES[device.type]
    if device.type == "cpu":
        torch.set_num_threads(1)  # small matrices; two threads only wait for each other
    memory = Memory(device, begin(way, device))
    warm_up(size, device, memory)
    found: Json = {
        "training": train(size, device, memory),
        "fragments": fragments(size, device, memory),
    }
    memory.begin()
    found["pairs"] = [pair(nbytes, size.pairs, device) for nbytes in PAIR_BYTES]
    if traces is not None and device.type == "cuda":
        try:
            found["recorded"] = recorded(way, device, traces)
        except Exception as error:  # what was measured before is not to be lost to it
            found["recorded"] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(
        prog="python -m bench.allocator_gpu_child",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--way", choices=WAYS, required=True)
    cli.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    cli.add_argument("--json", type=Path, required=True, metavar="FILE")
    cli.add_argument("--traces", type=Path, metavar="DIR")
    args = cli.parse_args(argv)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    args.json.write_text(json.dumps(run(args.way, device, args.traces)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
