"""A second opinion on the C++ models of PyTorch's caching policies: slow, and as plain as it gets.

Segments are lists of cells; every search walks all of them. The rules are those that
``bench/native/torch_policy.h`` states; nothing else is shared with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20
USED, FREE, BARE = "used", "free", "bare"  # bare: addresses without memory


@dataclass
class Cell:
    address: int
    size: int
    state: str


@dataclass
class Segment:
    small: bool
    stream: int
    page: int  # 0: from cudaMalloc
    cells: list[Cell] = field(default_factory=list)

    def join(self) -> None:
        """Neighbours in the same state become one, unless they are used."""
        joined: list[Cell] = []
        for cell in self.cells:
            if joined and joined[-1].state == cell.state != USED:
                joined[-1].size += cell.size
            else:
                joined.append(cell)
        self.cells = joined

    def cut(self, cell: Cell, size: int, front: str, rest: str) -> Cell:
        """Splits a cell; the front of ``size`` bytes is returned."""
        at = self.cells.index(cell)
        made = Cell(cell.address, size, front)
        tail = Cell(cell.address + size, cell.size - size, rest)
        self.cells[at : at + 1] = [made, tail] if tail.size else [made]
        return made


class TorchCachingModel:
    """One device. ``calls`` and ``peak`` are what the replay reports."""

    def __init__(self, device_bytes: int, *, expandable: bool) -> None:
        self.device_bytes = device_bytes
        self.expandable = expandable
        self.segments: list[Segment] = []
        self.calls: dict[str, int] = {}
        self.held = self.peak = 0
        self.next_address = 1 << 40

    def count(self, name: str, calls: int = 1) -> None:
        if calls:
            self.calls[name] = self.calls.get(name, 0) + calls

    def allocate(self, requested: int, stream: int) -> int:
        """An address; MemoryError if the device is too small."""
        size = max(512, -(-requested // 512) * 512)
        small = size <= MIB
        found = self.fitting(small, stream, size)
        if found is None:
            found = self.grow(small, stream, size)
        if found is None:
            self.release_cached()
            found = self.grow(small, stream, size)
        if found is None:
            raise MemoryError
        segment, cell = found
        rest = cell.size - size
        if rest >= 512 if small or self.expandable else rest > MIB:
            cell = segment.cut(cell, size, USED, FREE)
        cell.state = USED
        return cell.address

    def free(self, address: int) -> None:
        for segment in self.segments:
            for cell in segment.cells:
                if cell.address == address and cell.state == USED:
                    cell.state = FREE
                    segment.join()
                    return
        raise KeyError(address)

    def fitting(self, small: bool, stream: int, size: int) -> tuple[Segment, Cell] | None:
        fits = []
        for segment in self.segments:
            if (segment.small, segment.stream) != (small, stream):
                continue
            for i, cell in enumerate(segment.cells):
                if cell.state == FREE and cell.size >= size:
                    after = segment.cells[i + 1] if i + 1 < len(segment.cells) else None
                    reach = cell.size + (after.size if after and after.state == BARE else 0)
                    fits.append((cell.size, cell.address, reach, segment, cell))
        fits.sort(key=lambda fit: fit[:2])
        if not fits:
            return None
        chosen = 0
        while self.expandable and chosen + 1 < len(fits):
            if fits[chosen + 1][2] >= fits[chosen][2]:
                break
            chosen += 1
        return fits[chosen][3:]

    def grow(self, small: bool, stream: int, size: int) -> tuple[Segment, Cell] | None:
        if self.expandable:
            return self.grow_range(small, stream, size)
        if small:
            bytes_ = 2 * MIB
        else:
            bytes_ = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.count("cudaMalloc")
        if not self.hold(bytes_):
            return None
        cell = Cell(self.addresses(bytes_), bytes_, FREE)
        self.segments.append(Segment(small, stream, 0, [cell]))
        return self.segments[-1], cell

    def hold(self, size: int) -> bool:
        if self.held + size > self.device_bytes:
            return False
        self.held += size
        self.peak = max(self.peak, self.held)
        return True

    def addresses(self, size: int) -> int:
        address = self.next_address
        self.next_address += size + MIB * 64
        return address

    def grow_range(self, small: bool, stream: int, size: int) -> tuple[Segment, Cell] | None:
        segment, start = self.room(small, stream, size)
        while True:
            cell = next(c for c in segment.cells if c.address <= start < c.address + c.size)
            if cell.state == FREE:
                if cell.size >= size:
                    return segment, cell
                missing = size - cell.size
                cell = segment.cells[segment.cells.index(cell) + 1]
            else:
                missing = size
            if not self.map(segment, cell, min(missing, cell.size)):
                return None

    def room(self, small: bool, stream: int, size: int) -> tuple[Segment, int]:
        """Where the lowest run of unused cells of that size with a bare one at its start begins."""
        for segment in self.segments:
            if (segment.small, segment.stream) != (small, stream):
                continue
            for i, cell in enumerate(segment.cells):
                if cell.state != BARE:
                    continue
                first = i - 1 if i and segment.cells[i - 1].state == FREE else i
                unused = 0
                for follower in segment.cells[first:]:
                    if follower.state == USED:
                        break
                    unused += follower.size
                if unused >= size:
                    return segment, segment.cells[first].address
        page = (2 if small else 20) * MIB
        bytes_ = -(-(self.device_bytes + self.device_bytes // 8) // page) * page
        self.count("cuMemAddressReserve")
        segment = Segment(small, stream, page, [Cell(self.addresses(bytes_), bytes_, BARE)])
        self.segments.append(segment)
        return segment, segment.cells[0].address

    def map(self, segment: Segment, cell: Cell, size: int) -> bool:
        pages = -(-size // segment.page)
        before, made = self.held, 0
        while made < pages:
            self.count("cuMemCreate")
            if not self.hold(segment.page):
                self.count("cuMemRelease", made)
                self.held = before
                return False
            made += 1
        self.count("cuMemMap", pages)
        self.count("cuMemSetAccess")
        segment.cut(cell, pages * segment.page, FREE, BARE)
        segment.join()
        return True

    def release_cached(self) -> None:
        for segment in list(self.segments):
            if segment.page:
                self.unmap(segment)
            elif len(segment.cells) == 1 and segment.cells[0].state == FREE:
                self.count("cudaFree")
                self.held -= segment.cells[0].size
                self.segments.remove(segment)

    def unmap(self, segment: Segment) -> None:
        base = segment.cells[0].address
        for cell in [cell for cell in segment.cells if cell.state == FREE]:
            begin = -(-(cell.address - base) // segment.page) * segment.page + base
            end = (cell.address + cell.size - base) // segment.page * segment.page + base
            if begin >= end:
                continue
            pages = (end - begin) // segment.page
            self.count("cuStreamSynchronize")
            self.count("cuMemUnmap", pages)
            self.count("cuMemRelease", pages)
            self.held -= end - begin
            if begin > cell.address:
                at = segment.cells.index(cell)
                segment.cut(cell, begin - cell.address, FREE, FREE)
                cell = segment.cells[at + 1]
            segment.cut(cell, end - begin, BARE, FREE)
        segment.join()
        if len(segment.cells) == 1 and segment.cells[0].state == BARE:
            self.count("cuMemAddressFree")
            self.segments.remove(segment)
