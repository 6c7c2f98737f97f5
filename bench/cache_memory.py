"""Peak memory of one kind of cache, in a process of its own: ``python -m bench.cache_memory``.

Prints one JSON object. The peak is the process's high-water mark (VmHWM) over what it had when the
model was built; random K and V are put in through ``update``, then a few tokens are decoded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import vattn
from bench.cache_model import KINDS, Shape, fill_randomly, forward, make_cache, make_model
from bench.common import Json
from bench.provenance import ROOT

_DECODED = 4


def measure_memory(kind: str, shape: Shape) -> Json:
    """Runs :func:`main` in a new process: the high-water mark of a process never falls."""
    command = [sys.executable, "-m", "bench.cache_memory", kind, json.dumps(shape.as_json())]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if out.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{out.stderr}")
    found: Json = json.loads(out.stdout.splitlines()[-1])
    return found


def process_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def reset_peak() -> None:
    """Sets the high-water mark to the present size, where the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("cannot reset VmHWM here: the peak may include building the model", file=sys.stderr)


def virtual_bytes(cache: vattn.VirtualCache) -> Json:
    """Physical bytes of a VirtualCache while in use, after release and after trim."""
    kv = cache.kv
    assert kv is not None
    driver = kv.pool.driver
    stats = cache.stats()
    runs = sum(region.runs for region in kv.layout.regions)
    found: Json = {
        "page_bytes": stats.page_bytes,
        "runs": runs,
        "token_bytes": stats.token_bytes,
        "live_bytes": stats.live_bytes,
        "live_limit_bytes": stats.token_bytes + runs * stats.open_slots * stats.page_bytes,
        "cover_bytes": stats.cover_bytes,
        "stale_bytes": stats.stale_bytes,
        "pooled_bytes": stats.pooled_bytes,
        "physical_bytes": driver.physical_bytes(),
        "driver_calls": stats.driver_calls,
    }
    cache.check()
    cache.reset()
    released = cache.stats()
    found["after_release"] = {
        "live_bytes": released.live_bytes,
        "stale_bytes": released.stale_bytes,
        "physical_bytes": driver.physical_bytes(),
    }
    trimmed = kv.trim()
    found["after_trim"] = {"returned_bytes": trimmed, "physical_bytes": driver.physical_bytes()}
    cache.check()
    return found


def main() -> None:
    cli = argparse.ArgumentParser(prog="python -m bench.cache_memory", description=__doc__)
    cli.add_argument("kind", choices=KINDS)
    cli.add_argument("shape", type=json.loads, help="bench.cache_model.Shape as JSON")
    args = cli.parse_args()
    shape = Shape(**args.shape)
    with torch.inference_mode():
        model = make_model(shape)
        ids = torch.zeros((shape.batch, 1), dtype=torch.long)
        forward(model, make_cache("dynamic", model, shape), ids)  # buffers that every kind needs
        reset_peak()
        before = process_kib("VmRSS")
        cache = make_cache(args.kind, model, shape)
        fill_randomly(cache, shape)
        for _ in range(min(_DECODED, shape.steps)):
            ids = forward(model, cache, ids)
        found: Json = {
            "kind": args.kind,
            "before_bytes": before * 1024,
            "peak_bytes": process_kib("VmHWM") * 1024,
            "resident_bytes": process_kib("VmRSS") * 1024,
        }
        found["peak_over_model_bytes"] = found["peak_bytes"] - found["before_bytes"]
        if isinstance(cache, vattn.VirtualCache):
            found["virtual"] = virtual_bytes(cache)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
