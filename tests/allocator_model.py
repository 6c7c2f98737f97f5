"""What the allocator's tests share: an allocator beside a plain record of what it must hold.

Every block carries its owner's bytes at both ends, so a page that shows up at two live addresses,
or with somebody else's contents, never compares equal. `check()` runs after every operation.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.helpers import MEMORY_OPS, make_pool
from vattn import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.drivers import Memory

UNIT = 512  # every request is rounded up to a multiple, every address is one
KIB, MIB = 1 << 10, 1 << 20
PAGE = 64 * KIB  # where the driver allows it: 16 pages are the most that counts as small
MARK_BYTES = 16


def rounded(nbytes: int) -> int:
    return -(-nbytes // UNIT) * UNIT


@dataclass
class Block:
    """A live block, and the number that its bytes are made of."""

    address: int
    nbytes: int
    stream: int
    tag: int
    stamp: int

    @property
    def end(self) -> int:
        return self.address + rounded(self.nbytes)


class Allocator:
    """A `CachingAllocator` of so many pages, and its live blocks by address.

    Without `memory` no bytes are written.
    """

    def __init__(
        self,
        driver: _core.Driver,
        memory: Memory | None = None,
        *,
        pages: int = 256,
        page: int = PAGE,
        mapper: bool = False,
    ) -> None:
        self.page = max(page, driver.granularity())
        self.driver = driver
        self.memory = memory
        self.pool = make_pool(driver, pages=pages, page_bytes=self.page)
        self.core = _core.CachingAllocator(self.pool.core, self.pool.mapper if mapper else None)
        self.live: dict[int, Block] = {}
        self.stamps = 0

    # Operations.

    def allocate(self, nbytes: int, stream: int = 0, tag: int = 0) -> int:
        """A block of so many bytes, marked; it overlaps no other."""
        with tagged(tag):
            address = self.core.allocate(nbytes, stream)
        self.stamps += 1
        block = Block(address, nbytes, stream, tag, self.stamps)
        assert address % UNIT == 0
        for other in self.live.values():
            assert block.end <= other.address or other.end <= block.address, (block, other)
        self.live[address] = block
        self.mark(block)
        self.core.check()
        return address

    def pages(self, n: float, stream: int = 0, tag: int = 0) -> int:
        """A block of so many pages."""
        return self.allocate(int(n * self.page), stream, tag)

    def free(self, address: int) -> None:
        """Verifies the block's bytes and gives it back."""
        block = self.live[address]
        self.verify_block(block)
        self.core.free(address, block.nbytes)
        del self.live[address]
        self.core.check()

    def trim(self, keep_bytes: int = 0) -> int:
        given = self.core.trim(keep_bytes)
        self.core.check()
        self.verify()
        return given

    # Bytes.

    def mark(self, block: Block) -> None:
        if self.memory is None:
            return
        for at, data in self._marks(block):
            self.memory.write(at, data)

    def verify_block(self, block: Block) -> None:
        if self.memory is None or (block.tag and self.core.is_paused(block.tag)):
            return
        for at, data in self._marks(block):
            assert self.memory.read(at, len(data)) == data, block

    def verify(self) -> None:
        """Every block that is not paused has its owner's bytes."""
        for block in self.live.values():
            self.verify_block(block)

    def _marks(self, block: Block) -> Iterator[tuple[int, bytes]]:
        size = min(block.nbytes, MARK_BYTES)
        data = (block.stamp * 2654435761 % 2**32).to_bytes(4, "little") * 4
        yield block.address, data[:size]
        if block.nbytes >= 2 * MARK_BYTES:
            yield block.address + block.nbytes - size, data[::-1][:size]

    # What it tells.

    @property
    def figures(self) -> dict[str, Any]:
        return self.core.figures()

    @property
    def live_bytes(self) -> int:
        return sum(rounded(block.nbytes) for block in self.live.values())

    @property
    def mapped_pages(self) -> int:
        """Pages that the allocator holds."""
        mapped: int = self.figures["all"]["reserved_bytes"]["current"]
        assert mapped % self.page == 0
        return mapped // self.page

    @property
    def physical_pages(self) -> int:
        """Pages that exist."""
        return self.driver.physical_bytes() // self.page

    def calls(self, *ops: str) -> int:
        """Driver calls so far that changed mappings or memory, or those of the given kinds."""
        counters = self.driver.counters()
        return sum(counters[op][0] for op in ops or MEMORY_OPS)

    def end(self) -> None:
        """Frees everything and proves that no memory is left."""
        for address in list(self.live):
            self.free(address)
        assert self.figures["all"]["allocated_bytes"]["current"] == 0
        self.core.settle()
        self.core.trim()
        self.core.check()
        assert self.mapped_pages == 0
        assert self.physical_pages == 0


@contextmanager
def tagged(tag: int) -> Iterator[None]:
    """What this thread allocates in the block is under `tag`."""
    before = _core.set_current_tag(tag)
    try:
        yield
    finally:
        _core.set_current_tag(before)
