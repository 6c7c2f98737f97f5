"""The memory map as rows of few cells."""

from __future__ import annotations

from collections.abc import Mapping

from vattn.engine_process.messages import PageRows, Row
from vattn.kv.cache import KVCache


def page_rows(cache: KVCache, max_cells: int, owners: Mapping[int, tuple[int, int]]) -> PageRows:
    """The slots that have anything mapped.

    Args:
        cache: of the engine.
        max_cells: most of a row.
        owners: handle and index of the samples that are in slots.
    """
    layout = cache.layout
    most = max(region.run_bytes // layout.page_bytes for region in layout.regions)
    pages_per_cell = -(-most // max_cells)
    rows = [
        Row(slot, tokens, kept, *owners.get(slot, (-1, 0)), pages)
        for slot, tokens, kept, pages in cache.overview(-(-most // pages_per_cell))
    ]
    tokens = max(region.slot_tokens for region in layout.regions)
    return PageRows(layout.page_bytes, cache.max_seqs, tokens, pages_per_cell, rows)
