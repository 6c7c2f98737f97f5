"""LLMs whose memory is overwritten between steps, wherever nothing of anybody may be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import vattn

GARBAGE = 1e30  # finite, as the contract of a page's contents says; a softmax of it is all or none


class Poison:
    """Overwrites K and V beyond what sequences and kept prefixes hold, before each step.

    Args:
        llm: on the CPU, with an ordinary cache.
    """

    def __init__(self, llm: vattn.LLM) -> None:
        self.spare = 0
        self.rows = self.stale_rows = 0  # that were overwritten: all, and those of free slots
        self._memory: Any = llm.engine.storage.memory
        self._cache: Any = llm.engine.storage.cache
        self._places = list(_places(self._cache))
        self._step = llm.engine.step
        llm.engine.step = self._poisoned_step  # type: ignore[method-assign]

    def _poisoned_step(self) -> Any:
        self.spread()
        return self._step()

    def spread(self) -> None:
        """Overwrites; with a negative :attr:`spare` also so many tokens that are needed."""
        # What is mapped in the background may be taken from other slots.
        self._memory._wait_for_tickets()
        cache = self._cache
        core = cache._slots
        is_open = [core.is_open(slot) for slot in range(cache.max_seqs)]
        held = [
            core.tokens(slot) if is_open[slot] else core.kept(slot)[1]
            for slot in range(cache.max_seqs)
        ]
        ids = [
            np.stack([core.page_ids(slot, region).ravel() for slot in range(cache.max_seqs)])
            for region in range(len(cache.layout.regions))
        ]
        # Pages are shared at the same place of each slot.
        needed = [np.zeros(int(each.max(initial=0)) + 1, np.int64) for each in ids]
        for each, need in zip(ids, needed, strict=True):
            for slot, tokens in enumerate(held):
                np.maximum.at(need, each[slot], max(0, tokens + self.spare))
        free = ~np.array(is_open)[:, None]
        for region, place, rows, garbage in self._places:
            page = ids[region][:, place]
            spoiled = (page != 0) & (np.arange(len(place)) >= needed[region][page])
            rows[torch.from_numpy(spoiled)] = garbage
            self.rows += int(spoiled.sum())
            self.stale_rows += int((spoiled & free).sum())


def _places(cache: Any) -> Iterator[tuple[int, np.ndarray, torch.Tensor, float]]:
    """Region, page of each token in its slot, and rows ``[slots, tokens, head_dim]``; of a head."""
    for layer in range(len(cache.specs)):
        region = cache.layout.places[layer][0]
        for tensor in cache.layer(layer):
            for head in range(tensor.shape[2]):
                rows = tensor[:, :, head]
                start = rows.data_ptr() - cache._slots.address(0, region)
                token = np.arange(rows.shape[1])
                place = start + token * rows.stride(1) * rows.element_size()
                yield region, place // cache.pool.page_bytes, rows, GARBAGE * (1 - 2 * (layer % 2))


def make(model: str, **settings: Any) -> vattn.LLM:
    """For AsyncLLM's ``llm_factory``."""
    llm = vattn.LLM(model, **settings)
    Poison(llm)
    return llm
