"""Contents for slots, and how far a kernel's result is from what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vattn import KVCache
from vattn.kv.layout import round_up

# ||out - reference|| / ||reference||: above what the arithmetic of the dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def fill(
    cache: KVCache, layer: int, lengths: Sequence[int], k: torch.Tensor, v: torch.Tensor
) -> None:
    """Random tokens, finite garbage up to the end of the last tile, NaN where nobody may read."""
    region = cache.layout.regions[cache.layout.places[layer][0]]
    page = cache.pool.page_bytes
    for x in (k, v):
        for slot, length in enumerate(lengths):
            cover = max(round_up(length, tile) for tile in cache.layout.tiles)
            mapped = round_up(cover * region.token_bytes, page) // region.token_bytes
            x[slot, :cover].normal_()
            x[slot, cover:mapped] = float("nan")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (out.float() - expected).norm() / expected.norm()
    return float(difference)
