"""Traces of allocations as lists of plain records."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.alloc_traces.trace_file import AllocTrace

Record = tuple[int, int, int]  # id, stream, bytes


def make_trace(records: list[Record], **settings: Any) -> AllocTrace:
    columns = np.array(records, np.int64).reshape(-1, 3)
    return AllocTrace(
        name="made",
        ids=columns[:, 0].astype(np.uint32),
        streams=columns[:, 1].astype(np.uint8),
        sizes=columns[:, 2].astype(np.uint64),
        **settings,
    )


def records_of(trace: AllocTrace) -> list[Record]:
    columns = (trace.ids.tolist(), trace.streams.tolist(), trace.sizes.tolist())
    return list(zip(*columns, strict=True))
