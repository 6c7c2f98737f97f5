"""``ensure`` that has nothing to do: what every step of an engine pays."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.common import Json, wall_clock
from bench.provenance import ROOT
from vattn import KVCache

NATIVE = "vattn_ensure_bench"
_CALLS = 50  # per timing

Int32Array = npt.NDArray[np.int32]


def find_native(given: Path | None) -> Path | None:
    """The C++ benchmark: the one given, else the newest ``build/**/vattn_ensure_bench``."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"--ensure-bench {given} does not exist")
        return given
    found = [path for path in (ROOT / "build").rglob(NATIVE) if os.access(path, os.X_OK)]
    files = [path for path in found if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def run_native(path: Path) -> Json:
    """Runs it; its standard output is one JSON object with ``ensure_ns_per_sequence``."""
    out = subprocess.run([path, "--json"], capture_output=True, text=True, timeout=120, check=True)
    found: Json = json.loads(out.stdout)
    return found | {"binary": path.name}


def measure_ensure_many(device: str, sequences: int, rounds: int) -> list[Json]:
    """Microseconds of one ``KVCache.ensure_many`` from int32 arrays that maps nothing.

    Once with lengths that stay, once with one more token each at every call, within mapped pages.
    """
    with KVCache(
        8, 8, 64, torch.float32, max_seqs=sequences, max_tokens=_CALLS + 2, device=device
    ) as cache:
        slots = np.array([int(cache.open()) for _ in range(sequences)], dtype=np.int32)
        lengths = [np.full(sequences, n + 1, dtype=np.int32) for n in range(_CALLS + 1)]
        cache.ensure_many(slots, lengths[-1])
        calls = cache.stats().driver_calls
        same = [_timed(cache, slots, [lengths[-1]] * _CALLS) for _ in range(rounds)]
        growing = []
        for _ in range(rounds):
            for slot in slots:
                cache.truncate(int(slot), 1)
            growing.append(_timed(cache, slots, lengths[1:]))
        if cache.stats().driver_calls != calls:
            raise AssertionError("ensure_many called the driver although nothing was missing")
    return [
        {
            "device": device,
            "what": what,
            "sequences": sequences,
            "us": statistics.median(times) * 1e6,
            "best_us": min(times) * 1e6,
        }
        for what, times in (("same lengths", same), ("one more token each", growing))
    ]


def _timed(cache: KVCache, slots: Int32Array, steps: Sequence[Int32Array]) -> float:
    def work() -> None:
        for tokens in steps:
            cache.ensure_many(slots, tokens)

    return wall_clock(work) / len(steps)
