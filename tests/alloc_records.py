"""Records of allocation traces made by hand or at random, and the replay of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.alloc_traces.trace_file import RECORD
from bench.allocator_native import Replay
from bench.common import Json

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

Record = tuple[int, int, int]  # block, stream, bytes or 0
Run = Callable[..., Json]  # (policy, records, device=bytes, repeat=times)

_MOST_LIVE = 150  # blocks of random records


def request(block: int, mib: float, stream: int = 0) -> Record:
    """A request of so many MiB."""
    return block, stream, int(mib * MIB)


def release(*blocks: int) -> list[Record]:
    """Releases, in the order given."""
    return [(block, 0, 0) for block in blocks]


def random_records(rng: random.Random, count: int, largest: float) -> list[Record]:
    """So many requests and releases on two streams.

    Args:
        rng: where they come from.
        count: of records.
        largest: a request has up to ``2**largest`` bytes; most are near that.
    """
    records: list[Record] = []
    live: dict[int, int] = {}  # block -> stream
    for number in range(count):
        if live and (len(live) == _MOST_LIVE or rng.random() < 0.4):
            block = rng.choice(list(live))
            records.append((block, live.pop(block), 0))
        else:
            live[number] = rng.randrange(2)
            records.append((number, live[number], int(2 ** rng.triangular(4, largest, largest))))
    return records


def runner(replay: Replay, folder: Path) -> Run:
    """A function that writes records to a file in the folder and replays them."""

    def run(policy: str, records: Sequence[Record], device: int = 4 * GIB, repeat: int = 0) -> Json:
        raw = np.zeros(len(records), RECORD)
        for name, column in zip(
            ("id", "stream", "bytes"), zip(*records, strict=True), strict=False
        ):
            raw[name] = column
        path = folder / "records.raw"
        path.write_bytes(raw.tobytes())
        return replay.trace(path, policy, device, repeat)

    return run
