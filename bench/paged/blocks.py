"""The blocks of a paged cache: who holds which, and what a free one still contains; no torch here.

A block that nobody holds goes to the end of a queue, and the next that is needed comes from its
front. Until then it keeps its *name*, a digest of all tokens up to its end, and can be had back by
that name: the prefix cache is the blocks that have not been written again, as in vLLM V1.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

NULL_BLOCK = 0  # held by nobody: padding rows of captured graphs write there


class OutOfBlocks(RuntimeError):
    """More blocks are needed than are free; nothing has changed."""


class BlockPool:
    """Blocks by number, with how many sequences hold each.

    Args:
        num_blocks: of the cache, :data:`NULL_BLOCK` included.

    Attributes:
        taken: blocks handed out to be written, since the start.
        hits: blocks handed out for what they contain, since the start.
        overwritten: of those taken, how many had a name.
        tainted: held ones whose content nobody may have later: they have no names, and whoever
            drops the last hold has to clean them.

    Raises:
        ValueError: not even one block beside the null block.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks={num_blocks} leaves no block beside the one for padding; give 2 or "
                "more, or a larger budget"
            )
        self.num_blocks = num_blocks
        self.taken = self.hits = self.overwritten = 0
        self.reset()

    def reset(self) -> None:
        """Frees every block and forgets all names; the limit is lifted."""
        self._holders = [0] * self.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, self.num_blocks))
        self._withheld: list[int] = []
        self._to_withhold = 0
        self._names: dict[int, bytes] = {}
        # Several may contain the same: each was computed before another was known.
        self._named: dict[bytes, dict[int, None]] = {}
        self._shared: set[int] = set()
        self.tainted: set[int] = set()

    # Figures --------------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Blocks that may be held at once."""
        return self.num_blocks - 1 - self._to_withhold

    @property
    def free(self) -> int:
        """Blocks that can be taken now, those with a name included."""
        return len(self._free)

    @property
    def live(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - len(self._free) - len(self._withheld)

    @property
    def kept(self) -> int:
        """Free blocks that have a name."""
        return sum(block in self._free for block in self._names)

    @property
    def shared(self) -> int:
        """Blocks that two or more hold."""
        return sum(self._holders[block] > 1 for block in self._shared)

    @property
    def is_over(self) -> bool:
        """Whether more are held than the limit allows."""
        return len(self._withheld) < self._to_withhold

    def holders(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._holders[block]

    def held(self) -> list[int]:
        """All blocks that somebody holds."""
        return [block for block, holders in enumerate(self._holders) if holders]

    def name_of(self, block: int) -> bytes | None:
        """What a block is found by; None if it is not."""
        return self._names.get(block)

    def was_shared(self, block: int) -> bool:
        """Whether two held a block at once since nobody held it."""
        return block in self._shared

    def room_after(self, drops: Mapping[int, int]) -> int:
        """Blocks that could be taken if each of these were held so many times less."""
        freed = sum(self._holders[block] == times for block, times in drops.items())
        owed = self._to_withhold - len(self._withheld)
        return self.free + max(0, freed - owed)

    # Holding --------------------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """Blocks to be written, each held once. Those that were free longest go first.

        Raises:
            OutOfBlocks: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks are needed, and {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            if block in self._names:
                self.forget(block)
                self.overwritten += 1
        self.taken += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Holds blocks once more, for what they contain."""
        for block in blocks:
            if self._holders[block]:
                self._shared.add(block)
            else:
                del self._free[block]
            self._holders[block] += 1
            self.hits += 1

    def drop(self, blocks: Sequence[int]) -> list[int]:
        """Holds blocks of one sequence once less.

        Those that nobody holds then are free; the last of them is taken first, since what comes
        before it is of use without it.

        Returns:
            Those that nobody holds now; see :meth:`untaint`.
        """
        freed = []
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._shared.discard(block)
                freed.append(block)
                if self.is_over:
                    self._withhold(block)
                else:
                    self._free[block] = None
        return freed

    # Contents -------------------------------------------------------------------------------------

    def name(self, block: int, digest: bytes) -> None:
        """Says what a block that is held contains, from now on and until it is taken again."""
        assert self._holders[block] > 0, block
        assert block not in self.tainted, block
        if self._names.get(block) == digest:
            return
        self.forget(block)
        self._names[block] = digest
        self._named.setdefault(digest, {})[block] = None

    def find(self, digest: bytes) -> int | None:
        """A block that contains this; None if there is none."""
        blocks = self._named.get(digest)
        return next(iter(blocks)) if blocks else None

    def forget(self, block: int) -> None:
        """A block is not found any more, if it could be."""
        digest = self._names.pop(block, None)
        if digest is not None:
            same = self._named[digest]
            del same[block]
            if not same:
                del self._named[digest]

    def taint(self, blocks: Iterable[int]) -> None:
        """Blocks that are held are not found any more, and are to be cleaned by who drops them."""
        for block in blocks:
            assert self._holders[block] > 0, block
            self.forget(block)
            self.tainted.add(block)

    def untaint(self, freed: Iterable[int]) -> list[int]:
        """Which of the blocks that were just dropped are to be cleaned, now; each is told once."""
        dirty = sorted(self.tainted.intersection(freed))
        self.tainted.difference_update(dirty)
        return dirty

    def forget_free(self) -> None:
        """No block that nobody holds is found any more."""
        for block in [block for block in self._names if block in self._free]:
            self.forget(block)

    # Limit ----------------------------------------------------------------------------------------

    def set_limit(self, blocks: int) -> None:
        """Moves the limit: blocks beyond it are withheld, those free longest first.

        If too few are free, :attr:`is_over` until others were dropped.

        Raises:
            ValueError: more than there are, or less than one.
        """
        most = self.num_blocks - 1
        if not 0 < blocks <= most:
            raise ValueError(f"a limit of {blocks} blocks must be between 1 and {most}")
        self._to_withhold = most - blocks
        while self.is_over and self._free:
            self._withhold(self._free.popitem(last=False)[0])
        while len(self._withheld) > self._to_withhold:
            block = self._withheld.pop()
            self._free[block] = None
            self._free.move_to_end(block, last=False)  # it contains nothing

    def _withhold(self, block: int) -> None:
        self.forget(block)
        self._withheld.append(block)

    # Invariants -----------------------------------------------------------------------------------

    def check(self, held: Mapping[int, int]) -> None:
        """Verifies the invariants.

        Args:
            held: how many sequences hold each block, as these say.

        Raises:
            AssertionError: one is broken.
        """
        known = Counter({block: n for block, n in enumerate(self._holders) if n})
        assert known == Counter(held), (known, held)
        assert NULL_BLOCK not in held
        assert NULL_BLOCK not in self._free
        free, withheld = set(self._free), set(self._withheld)
        assert not free & withheld, free & withheld
        assert not (free | withheld) & known.keys(), known
        assert len(free) + len(withheld) + len(known) == self.num_blocks - 1, "a block is lost"
        assert len(self._withheld) == len(withheld) <= self._to_withhold, self._withheld
        assert not (self.is_over and free), "blocks are free beyond the limit"
        assert not withheld & self._names.keys(), withheld
        found = {block: digest for digest, blocks in self._named.items() for block in blocks}
        assert found == self._names, (found, self._names)
        assert all(self._named.values()), self._named
        assert self._shared <= known.keys(), self._shared
        assert self.tainted <= known.keys(), self.tainted
        assert not self.tainted & self._names.keys(), self.tainted
        assert {b for b, n in known.items() if n > 1} <= self._shared, self._shared
