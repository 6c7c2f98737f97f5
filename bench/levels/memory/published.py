"""What was published of the memory level's questions."""

from __future__ import annotations

from bench.levels.level import Published
from bench.levels.memory.shapes import PUBLISHED_MOST

_PAPER = "vAttention (Prabhu et al.)"
_SETTING = "A100 80 GB, fp16, 2 GPUs for tp2, lengths of a chat trace"

FRAGMENTATION = tuple(
    Published(
        f"most requests in a batch, {shape}, pages of 2 MiB -> 64 KiB",
        f"{few} -> {many} ({many / few:.2f}x)",
        _PAPER,
        _SETTING,
    )
    for shape, (few, many) in PUBLISHED_MOST.items()
)

ALLOCATION = (
    Published("need for new memory, peak", "about 750 MB/s", _PAPER, _SETTING),
    Published("map and access of a 2 MiB page", "about 40 us", _PAPER, "A100"),
    Published("spikes of a step if mapping is not hidden", "5-15 ms", _PAPER, _SETTING),
    Published(
        "preparing block tables, part of a decode step", "up to 30%", _PAPER, "vLLM of 2024, A100"
    ),
)
