"""Block tables as a production engine keeps them: they persist, and only changes are sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vattn.attention.upload import Uploader


class BlockTables:
    """Which blocks each slot has, in order; a host array and its copy on the device.

    What lies beyond the blocks that a slot has now is left from before: a valid block's number,
    whose content is not the slot's. A kernel that reads it must not use it.

    Args:
        rows: one per slot.
        blocks: most of a slot.
        device: of the copy.

    Attributes:
        host: int32 ``[rows, blocks]``; written by :meth:`put` alone.
        device: int32 ``[rows, blocks]``, always the same memory; as ``host`` was at the latest
            :meth:`flush`, for what is launched after it.
        sent_bytes: to the device so far, places included.
        transfers: that these took.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        self.host: npt.NDArray[np.int32] = np.zeros((rows, blocks), np.int32)
        self.device = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self.sent_bytes = self.transfers = 0
        self._flat_host = self.host.reshape(-1)
        self._flat = self.device.view(-1)
        self._changed: list[tuple[int, int]] = []  # ranges of the flat tables
        self._upload = Uploader(device)

    @property
    def nbytes(self) -> int:
        """Of the tables on the device."""
        return int(self.host.nbytes)

    def put(self, row: int, first: int, blocks: Sequence[int]) -> None:
        """Writes the blocks of a slot from its ``first`` on."""
        if blocks:
            begin = row * self.host.shape[1] + first
            end = begin + len(blocks)
            self._flat_host[begin:end] = blocks
            self._changed.append((begin, end))

    def flush(self) -> None:
        """Sends what has changed, in one transfer, in the order of torch's current stream.

        What was launched before reads the tables as they were. Nothing waits.
        """
        if not self._changed:
            return
        places = np.concatenate([np.arange(*each) for each in self._changed])
        values = self._flat_host[places]  # a place that was written twice has its latest value
        self._changed = []
        # Not of the inference mode that somebody may be in: it is written in place for ever.
        with torch.inference_mode(False), torch.no_grad():
            self._flat.index_copy_(0, *self._upload(places, values))
        self.sent_bytes += places.nbytes + values.nbytes
        self.transfers += 1

    def check(self) -> None:
        """Verifies that the device has what the host has, but for what is to be sent.

        Waits for the device.

        Raises:
            AssertionError: it has not.
        """
        different = np.flatnonzero(self._flat.cpu().numpy() != self._flat_host)
        pending = {place for each in self._changed for place in range(*each)}
        assert set(different.tolist()) <= pending, different
