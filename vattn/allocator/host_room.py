"""Page-locked memory of the host in which a paused tag's contents are kept."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: for the contexts of all devices


class PinnedRoom:
    """So many bytes, page-locked; the host has them back as soon as they are dropped.

    Tensors with ``pin_memory=True`` are not used: PyTorch rounds them up to a power of two and
    keeps their memory page-locked for later ones.

    Args:
        nbytes: above zero.
        device: whose CUDA context registers it.

    Raises:
        MemoryError: the host does not have as much, or CUDA does not lock it.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes = nbytes
        self._device = device
        try:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the host has no {nbytes} bytes: {error}") from error
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)
        try:
            self._register()
        except BaseException:
            self._unmap()
            raise

    def drop(self) -> None:
        """Gives the memory back; nothing may use it any more. A second time does nothing."""
        if self.address == 0:
            return
        # After a lost context nothing is registered any more.
        with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]
        self._unmap()

    def _register(self) -> None:
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(cudart.cudaHostRegister(self.address, self.nbytes, _PORTABLE))
        if code != 0:
            _forget_error(self._device)
            raise MemoryError(f"CUDA does not page-lock {self.nbytes} bytes (error {code})")

    def _unmap(self) -> None:
        self.address = 0
        del self._first  # the mapping cannot go while it is referred to
        self._map.close()


def _forget_error(device: int) -> None:
    """The runtime tells a failure again to whoever asks next, which is the next kernel launch."""
    with contextlib.suppress(Exception):
        torch.zeros(1, device=f"cuda:{device}")
