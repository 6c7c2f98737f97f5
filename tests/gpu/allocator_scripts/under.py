"""Runs an unchanged script with its memory from one of several places.

    python -m tests.gpu.allocator_scripts.under WAY DEVICE SCRIPT [argument ...]

WAY is ``native``, ``enable`` or ``pool``. After the script's output it prints a line of JSON: most
bytes of tensors, or of PyTorch's segments, that vattn has held; 0 under ``native``.
"""

from __future__ import annotations

import json
import runpy
import sys

from tests.gpu.allocator_scripts.begin import check, core, enabled
from vattn import allocator


def main() -> None:
    way, device, script = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    peak = 0
    if way == "native":
        runpy.run_path(script, run_name="__main__")
    elif way == "enable":
        with enabled(device):
            runpy.run_path(script, run_name="__main__")
            peak = peak_live_bytes()
    elif way == "pool":
        peak = run_in_pool(device, script)
    else:
        raise SystemExit(f"{way}: there is no such way; use native, enable or pool")
    print(json.dumps({"peak_live_bytes": peak}), flush=True)


def run_in_pool(device: str, script: str) -> int:
    if device != "cuda":  # the bridge is all of a process's memory
        with enabled(device), allocator.pool(tag="all"):
            runpy.run_path(script, run_name="__main__")
            return peak_live_bytes()
    with allocator.pool(tag="all"):
        runpy.run_path(script, run_name="__main__")
    check(device)
    return peak_live_bytes()


def peak_live_bytes() -> int:
    return int(core().figures()["all"]["allocated_bytes"]["peak"])


if __name__ == "__main__":
    main()
