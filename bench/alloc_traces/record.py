"""Records the traces again: ``python -m bench.alloc_traces.record [--only NAME] [--out DIR]``.

Sizes and order of what a run asks for depend on the versions of torch and transformers, and a
recording replaces the one before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from bench.alloc_traces.beam import BEAM
from bench.alloc_traces.cpu_source import record_cpu
from bench.alloc_traces.cuda_source import record_cuda
from bench.alloc_traces.moe import MOE
from bench.alloc_traces.program import Workload
from bench.alloc_traces.serving import SERVING
from bench.alloc_traces.trace_file import AllocTrace
from bench.alloc_traces.training import TRAINING
from bench.provenance import ROOT
from vattn.config import format_bytes

DATA = ROOT / "bench" / "data" / "alloc"
WORKLOADS = {workload.name: workload for workload in (*TRAINING, *MOE, *BEAM, *SERVING)}


def record(workload: Workload, device: torch.device) -> AllocTrace:
    """Runs a workload on a device and returns its trace.

    Raises:
        ValueError: a device of a type that cannot be recorded.
    """
    meta = {
        "about": workload.about,
        "settings": workload.settings,
        "transformers": transformers.__version__,
    }
    if device.type == "cpu":
        return record_cpu(workload.name, workload.program, meta)
    return record_cuda(workload.name, workload.program, meta, device)


def show(path: Path) -> None:
    """Prints one line about a trace in a file."""
    trace = AllocTrace.load(path)
    steady = "varies" if trace.steady_from < 0 else f"steady from record {trace.steady_from}"
    print(
        f"{trace.name:13} {trace.operations:6} operations, {trace.peak_live_bytes / 2**20:.1f} MiB "
        f"live at the peak, {trace.meta['iterations']} iterations, {steady}; "
        f"{format_bytes(path.stat().st_size)}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.alloc_traces.record", description=__doc__
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=sorted(WORKLOADS),
        help="record this one; may be given several times",
    )
    parser.add_argument("--out", type=Path, default=DATA, help="where the files go")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="cpu, or a CUDA device"
    )
    parser.add_argument("--list", action="store_true", help="show the files that are there instead")
    options = parser.parse_args(arguments)
    names = options.only or list(WORKLOADS)
    if options.list:
        for name in names:
            show(options.out / f"{name}.npz")
        return 0
    # One thread is not slower where others work, too, and gives kernels no buffers per thread.
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = options.out / f"{name}.npz"
        record(WORKLOADS[name], options.device).save(path)
        show(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
