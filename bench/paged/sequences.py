"""The sequences of a paged cache: the slots that are open, their blocks and lengths."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from bench.paged.blocks import BlockPool, OutOfBlocks
from bench.paged.tables import BlockTables
from vattn.config import positive_int

Int32 = npt.NDArray[np.int32]


class Sequences:
    """Slots with block tables; what :class:`.cache.PagedCache` builds on.

    Args:
        max_seqs: number of slots.
        max_tokens: longest sequence.
        num_blocks: of the cache, the null block included.
        block_tokens: tokens of a block.
        device: of the tables.

    Attributes:
        max_blocks: of one sequence.
        blocks: who holds which.
        tables: what kernels read.
        lengths: int32 ``[max_seqs]``, tokens of each slot; 0 of one that is not open.
        counts: int32 ``[max_seqs]``, blocks of each slot.

    Raises:
        ValueError: a size that is not positive, or too few blocks.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        max_tokens: int,
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.max_seqs = positive_int(max_seqs, "max_seqs")
        self.max_tokens = positive_int(max_tokens, "max_tokens")
        self.num_blocks = positive_int(num_blocks, "num_blocks")
        self.block_tokens = positive_int(block_tokens, "block_tokens")
        self.max_blocks = -(-self.max_tokens // self.block_tokens)
        self.blocks = BlockPool(self.num_blocks)
        self.tables = BlockTables(self.max_seqs, self.max_blocks, device)
        self._clear()

    def _clear(self) -> None:
        self.lengths: Int32 = np.zeros(self.max_seqs, np.int32)
        self.counts: Int32 = np.zeros(self.max_seqs, np.int32)
        self._open = np.zeros(self.max_seqs, np.bool_)
        self._closed = list(range(self.max_seqs))  # a heap: the smallest is opened first

    def blocks_for(self, tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-tokens // self.block_tokens)

    def is_open(self, slot: int) -> bool:
        """Whether a sequence has the slot."""
        return bool(self._open[slot])

    @property
    def open_slots(self) -> int:
        """How many are open."""
        return self.max_seqs - len(self._closed)

    def tokens(self, slot: int) -> int:
        """Of a slot."""
        return int(self.lengths[slot])

    def blocks_of(self, slot: int) -> list[int]:
        """The blocks of a slot, in order."""
        out: list[int] = self.tables.host[slot, : self.counts[slot]].tolist()
        return out

    # From open to release -------------------------------------------------------------------------

    def open(self, slot: int | None = None) -> int:
        """Opens a slot without tokens, the first that is free or this one.

        Raises:
            OutOfBlocks: every slot is open.
            ValueError: this one is.
        """
        if slot is not None:
            if not 0 <= slot < self.max_seqs or self._open[slot]:
                raise ValueError(f"slot={slot} is not a free one of {self.max_seqs}")
            self._closed.remove(slot)
            heapq.heapify(self._closed)
        elif self._closed:
            slot = heapq.heappop(self._closed)
        else:
            raise OutOfBlocks(f"all {self.max_seqs} slots are open")
        self._open[slot] = True
        return slot

    def hold(self, slot: int, blocks: Sequence[int], tokens: int) -> None:
        """Gives an open slot without blocks these, which are held for it, and so many tokens."""
        assert self._open[slot], slot
        assert self.counts[slot] == 0, slot
        assert self.blocks_for(tokens) == len(blocks), (tokens, blocks)
        self._append(slot, blocks)
        self.lengths[slot] = tokens

    def needed(self, slots: Sequence[int] | Int32, tokens: Sequence[int] | Int32) -> int:
        """Blocks that slots lack for the first ``tokens[i]`` tokens of each."""
        if not len(slots):
            return 0
        return int(np.maximum(self._lacking(np.asarray(slots), np.asarray(tokens)), 0).sum())

    def _lacking(self, slots: Int32, tokens: Int32) -> Int32:
        return -(-tokens // self.block_tokens) - self.counts[slots]

    def ensure(self, slots: Sequence[int] | Int32, tokens: Sequence[int] | Int32) -> list[int]:
        """Gives each slot blocks for its first ``tokens[i]`` tokens, all or none, and that length.

        A slot that is longer stays as it is. The tables are sent.

        Args:
            slots: open ones, each once.
            tokens: as many lengths.

        Returns:
            The slots that got blocks.

        Raises:
            OutOfBlocks: too few are free.
            ValueError: a slot that is not open, or more tokens than a sequence can have.
        """
        rows, lengths = np.asarray(slots, np.int32), np.asarray(tokens, np.int32)
        if not len(rows):
            return []
        if lengths.max() > self.max_tokens:
            raise ValueError(f"tokens={lengths.max()} is more than max_tokens={self.max_tokens}")
        if not self._open[rows].all():
            raise ValueError(f"slots={rows.tolist()} are not all open")
        lacking = self._lacking(rows, lengths)
        (short,) = np.nonzero(lacking > 0)
        grown: list[int] = rows[short].tolist()
        if grown:
            found = self.blocks.take(int(lacking[short].sum()))
            for slot, more in zip(grown, lacking[short].tolist(), strict=True):
                self._append(slot, found[:more])
                found = found[more:]
        self.lengths[rows] = np.maximum(self.lengths[rows], lengths)
        self.tables.flush()
        return grown

    def _append(self, slot: int, blocks: Sequence[int]) -> None:
        self.tables.put(slot, int(self.counts[slot]), blocks)
        self.counts[slot] += len(blocks)

    def assign(self, slots: Sequence[int], sources: Sequence[int]) -> tuple[list[int], list[int]]:
        """Makes each slot what its source was before the call, but for bytes. The tables are sent.

        Full blocks are shared.

        Args:
            slots: open ones, each once.
            sources: as many open ones, each as long as its slot.

        Returns:
            Blocks to copy from, and as many to copy to: those in which sequences end. They may
            overlap, and all must be read before any is written.

        Raises:
            OutOfBlocks: too few are free for these.
        """
        moves = [(slot, each) for slot, each in zip(slots, sources, strict=True) if slot != each]
        assert all(self.lengths[slot] == self.lengths[each] for slot, each in moves), moves
        before = {each: self.blocks_of(each) for pair in moves for each in pair}
        full = {each: self.tokens(each) // self.block_tokens for _, each in moves}
        tails = [each for _, each in moves if len(before[each]) > full[each]]
        drops = Counter(block for slot, _ in moves for block in before[slot])
        drops.subtract(block for _, each in moves for block in before[each][: full[each]])
        room = self.blocks.room_after(drops)
        if len(tails) > room:
            raise OutOfBlocks(f"{len(tails)} blocks are needed, and {room} are free")
        for _, each in moves:  # before any is dropped, so that none is lost between
            self.blocks.share(before[each][: full[each]])
        for slot, _ in moves:
            self._drop(before[slot])
            self.counts[slot] = 0
        copies = self.blocks.take(len(tails))
        targets = iter(copies)
        for slot, each in moves:
            self._append(slot, before[each][: full[each]])
            if len(before[each]) > full[each]:
                self._append(slot, [next(targets)])
        self.tables.flush()
        return [before[each][-1] for each in tails], copies

    def truncate(self, slot: int, tokens: int) -> list[int]:
        """Shortens a slot; the blocks that nobody holds any more."""
        assert self._open[slot], slot
        assert tokens <= self.lengths[slot], (slot, tokens)
        keep = self.blocks_for(tokens)
        freed = self._drop(self.blocks_of(slot)[keep:])
        self.counts[slot], self.lengths[slot] = keep, tokens
        return freed

    def _drop(self, blocks: Sequence[int]) -> list[int]:
        freed = self.blocks.drop(blocks)
        if dirty := self.blocks.untaint(freed):
            self.clean(dirty)
        return freed

    def clean(self, blocks: Sequence[int]) -> None:
        """Blocks that were tainted are free; there is nothing in them where there is no memory."""

    def release(self, slot: int) -> list[int]:
        """Closes a slot; the blocks that nobody holds any more.

        What was launched may still use them: whatever is launched next comes after it.
        """
        freed = self.truncate(slot, 0)
        self._open[slot] = False
        heapq.heappush(self._closed, slot)
        return freed

    def clear(self, keep: int | None = None) -> None:
        """Closes every slot but one, which has no blocks, whatever state they are in."""
        limit = self.blocks.limit
        self.blocks.reset()
        self.blocks.set_limit(limit)
        self._clear()
        if keep is not None:
            self.open(keep)

    def find(
        self, slots: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where tokens lie: blocks and places in them, each int64 ``[T]``; see :meth:`locate`."""
        wide = np.asarray(positions, np.int64)
        columns = wide // self.block_tokens
        blocks: npt.NDArray[np.int64] = self.tables.host[slots, columns].astype(np.int64)
        return blocks, wide - columns * self.block_tokens

    def locate(
        self, slots: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        """Where tokens lie: int64 ``[T]``, block times ``block_tokens`` plus place in the block.

        Args:
            slots: integers ``[T]``.
            positions: integers ``[T]``, in their sequences; each within the blocks of its slot.
        """
        blocks, places = self.find(slots, positions)
        return blocks * self.block_tokens + places

    def check(self) -> None:
        """Verifies the invariants of slots, blocks and tables. Waits for the device.

        Raises:
            AssertionError: one is broken.
        """
        closed = {slot for slot in range(self.max_seqs) if not self._open[slot]}
        assert sorted(self._closed) == sorted(closed), self._closed
        held: Counter[int] = Counter()
        for slot in range(self.max_seqs):
            blocks, tokens = self.blocks_of(slot), self.tokens(slot)
            assert len(set(blocks)) == len(blocks), blocks
            assert len(blocks) == self.blocks_for(tokens), (slot, blocks, tokens)
            assert slot not in closed or not blocks, slot
            held.update(blocks)
            if tokens % self.block_tokens:  # it will be written
                assert self.blocks.holders(blocks[-1]) == 1, (slot, blocks)
        self.blocks.check(held)
        self.tables.check()
