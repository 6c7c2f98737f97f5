"""A step's small arrays on their way to the device, in one transfer that the host never awaits.

On a GPU they are packed into pinned memory: a ring of buffers, each with the event after which it
may be written again. Nothing is allocated on the host per step, once the buffers are large enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

# Where an array may begin: what the widest loads of kernels want.
ALIGNMENT = 16
# Transfers under way before the host has to wait for the first: a step makes one to three, and the
# next step is launched before this one has ended.
_BUFFERS = 8
_LEAST_BYTES = 1 << 16


class Event(Protocol):
    """A mark in the device's work."""

    def record(self) -> None:
        """Marks the end of the work launched so far on the current stream."""
        ...

    def synchronize(self) -> None:
        """Waits until the device is past the mark."""
        ...


class Uploader:
    """Moves arrays to one device, on torch's current stream.

    Args:
        device: where to.
        ring: the pinned memory that arrays go through; None for one's own on a GPU, and for none on
            a CPU, where nothing has to move.
    """

    def __init__(self, device: torch.device | str, ring: Ring | None = None) -> None:
        self.device = torch.device(device)
        if ring is None and self.device.type == "cuda":
            ring = Ring(pin=_pinned, event=lambda: _CudaEvent(self.device))
        self._ring = ring

    def __call__(self, *arrays: Array) -> list[torch.Tensor]:
        """The arrays as tensors of the same dtypes and shapes, in memory of their own.

        Args:
            arrays: nobody changes them afterwards: on a CPU the tensors are the arrays.
        """
        if self._ring is None:
            return [torch.from_numpy(array) for array in arrays]
        packing = Packing.of(arrays)
        self._check_not_capturing()
        target = torch.empty(packing.total_bytes, dtype=torch.uint8, device=self.device)
        self._ring.send(packing, arrays, target)
        return packing.views(target)

    def into(self, target: torch.Tensor, *arrays: Array) -> None:
        """Packs the arrays into the beginning of memory on the device, as :class:`Packing` says.

        Args:
            target: uint8 ``[bytes]``, contiguous. What was launched before may still read it.
            arrays: may be changed afterwards.

        Raises:
            ValueError: they do not fit.
        """
        packing = Packing.of(arrays)
        self._check_not_capturing()
        if packing.total_bytes > len(target):
            raise ValueError(
                f"the arrays are {packing.total_bytes} bytes, and there is room for {len(target)}"
            )
        if self._ring is None:
            packing.pack(arrays, target.numpy())
        else:
            self._ring.send(packing, arrays, target)

    def _check_not_capturing(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph would copy again what the buffer holds by then.
            raise RuntimeError("a transfer from the host is not captured; make it before")


@dataclass(frozen=True)
class Packing:
    """Where arrays lie in one piece of memory, each aligned to :data:`ALIGNMENT` bytes.

    Args:
        kinds: dtype and shape of each.
        offsets: in bytes, of each.
        total_bytes: of all of them.
    """

    kinds: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]
    offsets: tuple[int, ...]
    total_bytes: int

    @staticmethod
    def of(arrays: Sequence[Array]) -> Packing:
        """For arrays like these."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return Packing(tuple((a.dtype, a.shape) for a in arrays), tuple(offsets), end)

    def pack(self, arrays: Sequence[Array], memory: Bytes) -> None:
        """Copies the arrays to their places."""
        for offset, array in zip(self.offsets, arrays, strict=True):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory[offset : offset + len(flat)] = flat

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The arrays as tensors over uint8 ``[bytes]``; memory of theirs is not copied."""
        out = []
        for offset, (dtype, shape) in zip(self.offsets, self.kinds, strict=True):
            kind = _torch_dtype(dtype)
            end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            out.append(memory[offset:end].view(kind).view(shape))
        return out


class Ring:
    """Pinned buffers that take turns, so that the host may write one while others are being read.

    Args:
        pin: makes pinned uint8 memory of a number of bytes.
        event: makes an event.
        buffers: how many transfers may be under way before the host has to wait.
    """

    def __init__(
        self,
        *,
        pin: Callable[[int], torch.Tensor],
        event: Callable[[], Event],
        buffers: int = _BUFFERS,
    ) -> None:
        self._pin = pin
        self._buffers = [
            _Buffer(torch.empty(0, dtype=torch.uint8), event()) for _ in range(buffers)
        ]
        self._next = 0

    def send(self, packing: Packing, arrays: Sequence[Array], target: torch.Tensor) -> None:
        """Starts one copy of packed arrays to the beginning of ``target``."""
        if packing.total_bytes == 0:
            return
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.is_used:
            buffer.event.synchronize()
        if len(buffer.memory) < packing.total_bytes:
            # Powers of two, so that growing ends.
            buffer.memory = self._pin(
                max(_LEAST_BYTES, 1 << (packing.total_bytes - 1).bit_length())
            )
        packing.pack(arrays, buffer.memory.numpy())
        target[: packing.total_bytes].copy_(buffer.memory[: packing.total_bytes], non_blocking=True)
        buffer.event.record()
        buffer.is_used = True


@dataclass
class _Buffer:
    """Pinned memory, and the end of the latest copy from it."""

    memory: torch.Tensor
    event: Event
    is_used: bool = False


class _CudaEvent:
    """An event on torch's current stream of a device, which need not be the current device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


def _pinned(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


@functools.cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
