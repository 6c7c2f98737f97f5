"""Host memory for the K and V of preempted sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Saved:
    """The K and V of one sequence in host memory.

    ``tokens`` is its length, ``anchor`` the first query of its latest step (no sliding window
    reaches further back than from there), ``buffer`` uint8 ``[bytes]``.
    """

    tokens: int
    anchor: int
    buffer: torch.Tensor

    @property
    def bytes(self) -> int:
        """Host memory taken."""
        return self.buffer.numel()


class SwapSpace:
    """Host memory up to a limit, taken when needed and given back at once.

    Args:
        capacity_bytes: the limit; 0 for none at all.
        pinned: page-locked, so that a GPU copies at full speed and without waiting.
    """

    def __init__(self, capacity_bytes: int, *, pinned: bool) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"swap space of {capacity_bytes} bytes; give 0 or more")
        self.capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self.pinned = pinned
        self._saved: set[Saved] = set()
        self._leaving: list[tuple[torch.cuda.Event, Saved]] = []

    @property
    def used_bytes(self) -> int:
        """Bytes that are taken, or that copies may still use."""
        while self._leaving and self._leaving[0][0].query():  # type: ignore[no-untyped-call]
            self._end(self._leaving.pop(0)[1])
        return self._used_bytes

    def room_for(self, n: int) -> bool:
        """Whether ``n`` more bytes fit."""
        return 0 < n <= self.capacity_bytes - self.used_bytes

    def take(self, n: int, tokens: int, anchor: int) -> Saved:
        """Memory for a sequence; the caller copies into it.

        Raises:
            ValueError: it does not fit; ask :meth:`room_for` first.
        """
        if not self.room_for(n):
            raise ValueError(
                f"{n} bytes do not fit: {self.used_bytes} of {self.capacity_bytes} bytes of swap "
                "space are in use; raise swap_space"
            )
        buffer = torch.empty(n, dtype=torch.uint8, pin_memory=self.pinned)
        saved = Saved(tokens, anchor, buffer)
        self._saved.add(saved)
        self._used_bytes += n
        return saved

    def give_back(self, saved: Saved) -> None:
        """Ends the use of what :meth:`take` gave; once only.

        Copies of the current stream may still use pinned memory: it is free when they are done.
        """
        if not self.pinned:
            self._end(saved)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._leaving.append((event, saved))

    def _end(self, saved: Saved) -> None:
        self._saved.remove(saved)
        self._used_bytes -= saved.bytes

    def check(self) -> None:
        """Verifies the accounts."""
        used = self.used_bytes
        assert used == sum(saved.bytes for saved in self._saved), used
        assert 0 <= used <= self.capacity_bytes, used
