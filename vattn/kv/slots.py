"""Slots of a cache: their handles, and arguments that name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from vattn import _core
from vattn.kv.arrays import Int32Array, as_int32, as_integer


class Slot:
    """A handle of one open sequence. Good until it is released; ``int(slot)`` is its index."""

    __slots__ = ("_cache", "_generation", "index")

    def __init__(self, cache: SlotTable, index: int, generation: int) -> None:
        self._cache = cache
        self.index = index
        self._generation = generation

    def __index__(self) -> int:
        return self.index

    def __int__(self) -> int:
        return self.index

    def __repr__(self) -> str:
        return f"Slot({self.index})"


SlotLike: TypeAlias = "Slot | int"
SlotList: TypeAlias = "Int32Array | torch.Tensor | Sequence[SlotLike]"
LengthList: TypeAlias = "Int32Array | torch.Tensor | Sequence[int]"


class SlotTable:
    """What every part of a cache needs to talk to the core: its slots, and the stream in use."""

    device: torch.device
    max_seqs: int
    _space: _core.SlotSpace | None

    @property
    def _slots(self) -> _core.SlotSpace:
        if self._space is None:
            raise ValueError("this cache has been closed; make a new one")
        return self._space

    def _handle(self, index: int) -> Slot:
        return Slot(self, index, self._slots.generation(index))

    def _index(self, slot: SlotLike) -> int:
        if isinstance(slot, Slot):
            if slot._cache is not self:
                raise ValueError(f"{slot} belongs to another cache")
            if self._slots.generation(slot.index) != slot._generation:
                raise ValueError(f"{slot} was released; open a new sequence")
            return slot.index
        index = as_integer(slot)
        if not 0 <= index < self.max_seqs:
            raise ValueError(f"slot {index} is not one of the {self.max_seqs} slots of this cache")
        return index

    def _slot_array(self, slots: SlotList) -> Int32Array:
        if isinstance(slots, (np.ndarray, torch.Tensor)):
            return as_int32(slots)
        return np.fromiter((self._index(s) for s in slots), dtype=np.int32)

    def _stream(self, stream: int | None) -> int:
        if stream is not None:
            return stream
        if self.device.type == "cuda" and torch.cuda.is_available():
            return int(torch.cuda.current_stream(self.device).cuda_stream)
        return 0


def token_count(value: int, name: str = "tokens") -> int:
    """A length that the core can take.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is negative, or no length at all.
    """
    if not 0 <= as_integer(value) < 2**31:
        raise ValueError(f"{name}={value} must not be negative, and less than 2**31")
    return int(value)
