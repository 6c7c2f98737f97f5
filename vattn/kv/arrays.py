"""Slots and lengths as the arrays that the core takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Int32Array: TypeAlias = npt.NDArray[np.int32]


def as_integer(value: object) -> int:
    """An int, from anything that is a whole number.

    Raises:
        TypeError: it is not; a float or a bool, say.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{value!r} is not an integer")
    return operator.index(value)


def as_int32(values: Int32Array | torch.Tensor | Sequence[int]) -> Int32Array:
    """A contiguous int32 array on the CPU.

    Raises:
        TypeError: another dtype or device, or values that are not integers.
        ValueError: a value that does not fit.
    """
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"expected a CPU tensor, got one on {values.device}")
        values = values.numpy()
    if isinstance(values, np.ndarray):
        if values.dtype != np.int32:
            raise TypeError(
                f"expected int32, got {values.dtype}; convert it once, outside the loop"
            )
        return np.ascontiguousarray(values)
    lengths = [as_integer(value) for value in values]
    if lengths and not -(2**31) <= min(lengths) <= max(lengths) < 2**31:
        raise ValueError(f"{max(lengths, key=abs)} does not fit in int32")
    return np.asarray(lengths, dtype=np.int32)
