"""Figures of processes that use vattn, read from outside of them while they run.

Each such process has a page of memory behind a memfd named ``vattn-stats`` among its open files
(``csrc/stats_page.h``), in which pools, allocators, tags and ranges keep their figures. Nothing has
to be started for it, nothing is left when the process is killed, and reading costs the process
nothing. Whoever may debug a process may read its page: its own user, and root.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vattn.allocator.figures_layout import MAGIC, SHOWN, VERSION, Header, Page

_LINK = "/memfd:vattn-stats"

TagState = Literal["in use", "paused", "graph pool"]
RangeKind = Literal["small", "large"]
_STATES: tuple[TagState, ...] = ("in use", "paused", "graph pool")
_KINDS: tuple[RangeKind, ...] = ("small", "large")


@dataclass(frozen=True)
class PoolFigures:
    """A pool of pages, in bytes.

    ``created_bytes`` exists now. Of it ``free_bytes`` is in nobody's use, ``stale_bytes`` is held
    by sequences that have ended and by kept prefixes and can be evicted, and ``torch_mapped_bytes``
    is held by caching allocators, ``torch_idle_bytes`` of that in free blocks. What is left is
    :attr:`other_bytes`.

    Args:
        driver: ``"host"`` or ``"cuda:N"``.
        page_bytes: of one page.
        budget_bytes: most that may exist.
        created_bytes: see above.
        peak_created_bytes: most that ever existed.
        free_bytes: see above.
        stale_bytes: see above.
        refused: requests for pages that could not be met, though many of those who ask (an engine)
            know a way out.
        torch_mapped_bytes: see above.
        torch_idle_bytes: see above.
        torch_limit_bytes: of its caching allocators together; None if one of them has none.
        out_of_memory: errors of its caching allocators so far.
    """

    driver: str
    page_bytes: int
    budget_bytes: int
    created_bytes: int
    peak_created_bytes: int
    free_bytes: int
    stale_bytes: int
    refused: int
    torch_mapped_bytes: int
    torch_idle_bytes: int
    torch_limit_bytes: int | None
    out_of_memory: int

    @property
    def other_bytes(self) -> int:
        """Held by running sequences and by reserved tensors."""
        others = self.free_bytes + self.stale_bytes + self.torch_mapped_bytes
        return max(0, self.created_bytes - others)


@dataclass(frozen=True)
class TagFigures:
    """What a caching allocator holds under one tag, in bytes.

    Args:
        pool: index of its pool in :attr:`ProcessFigures.pools`; -1 if that is not shown.
        name: ``"(no tag)"`` for what has none.
        state: whether it is in use, paused, or belongs to CUDA graphs.
        live_bytes: of live blocks, each rounded up to 512.
        peak_live_bytes: most that was live at once.
        blocks: that are live.
        mapped_bytes: physical memory.
        budget_bytes: most physical memory that it may have; None if there is no limit.
        allocations: since the start.
    """

    pool: int
    name: str
    state: TagState
    live_bytes: int
    peak_live_bytes: int
    blocks: int
    mapped_bytes: int
    budget_bytes: int | None
    allocations: int


@dataclass(frozen=True)
class RangeFigures:
    """A range of addresses of a caching allocator.

    Args:
        pool: index of its pool in :attr:`ProcessFigures.pools`; -1 if that is not shown.
        tag: its name.
        address: of its first byte.
        stream: whose requests it serves, as a ``CUstream``.
        kind: of requests.
        reserved_bytes: addresses.
        mapped_bytes: physical memory.
    """

    pool: int
    tag: str
    address: int
    stream: int
    kind: RangeKind
    reserved_bytes: int
    mapped_bytes: int


@dataclass(frozen=True)
class ProcessFigures:
    """The figures of one process, read one after the other while it runs.

    Args:
        pid: of the process, as this one sees it.
        command: its command line.
        start_s: when it began to use vattn, in seconds since 1970.
        pools: all of them.
        tags: of all pools.
        ranges: of all tags, by address.
    """

    pid: int
    command: str
    start_s: float
    pools: tuple[PoolFigures, ...]
    tags: tuple[TagFigures, ...]
    ranges: tuple[RangeFigures, ...]


@dataclass(frozen=True)
class Unreadable:
    """A process that has a page which this version of vattn cannot read, and why."""

    pid: int
    command: str
    reason: str


class NoFiguresError(Exception):
    """A process has no page that can be read; the message says why."""


def processes() -> tuple[list[ProcessFigures], list[Unreadable]]:
    """All processes that use vattn and may be looked at, by process id.

    Returns:
        Those that were read, and those whose page is of another version. Processes of other users,
        and those that end meanwhile, are in neither.
    """
    found: list[ProcessFigures] = []
    unreadable: list[Unreadable] = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            figures = _read(pid)
        except NoFiguresError as error:
            unreadable.append(Unreadable(pid, _command(pid), str(error)))
        except OSError:  # another user's, or it has ended
            continue
        else:
            if figures is not None:
                found.append(figures)
    return found, unreadable


def process(pid: int) -> ProcessFigures:
    """The figures of one process.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: it belongs to somebody else.
        NoFiguresError: it does not use vattn, or another version of it.
    """
    try:
        figures = _read(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"there is no process {pid}") from error
    except PermissionError as error:
        raise PermissionError(
            f"process {pid} belongs to somebody else; look as its user or as root"
        ) from error
    if figures is None:
        raise NoFiguresError(f"process {pid} has no pool of vattn")
    return figures


def _read(pid: int) -> ProcessFigures | None:
    """The figures of a process; None if it has no page of its own."""
    folder = Path("/proc", str(pid))
    for data in _candidates(folder):
        page, version = _header(data)
        if page is None or page.pid != _own_pid(folder):
            continue  # not finished, or inherited from the process that forked this one
        if version != VERSION or len(data) < ctypes.sizeof(Page) or page.bytes != len(data):
            raise NoFiguresError(
                f"its page has version {version} and {len(data)} bytes, and this vattn reads "
                f"version {VERSION} of {ctypes.sizeof(Page)}; use the vattn of that process"
            )
        return _decode(pid, _command(pid), Page.from_buffer_copy(data))
    return None


def _candidates(folder: Path) -> Iterator[bytes]:
    """What the files of a process hold that are named as the page is."""
    for name in os.listdir(folder / "fd"):
        link = folder / "fd" / name
        try:
            if not os.readlink(link).startswith(_LINK):
                continue
            # Read, not mapped: a file that its owner shortens meanwhile must not kill us.
            with link.open("rb", buffering=0) as file:
                yield file.read(2 * ctypes.sizeof(Page)) or b""
        except FileNotFoundError:  # closed by now
            continue


def _header(data: bytes) -> tuple[Any, int]:
    if len(data) < ctypes.sizeof(Header):
        return None, 0
    header = Header.from_buffer_copy(data)
    return (header, header.version) if header.magic == MAGIC else (None, 0)


def _own_pid(folder: Path) -> int:
    """The id of a process in its own namespace, which is the one that it knows."""
    for line in (folder / "status").read_text(errors="replace").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return int(folder.name)  # a kernel without namespaces


def _command(pid: int) -> str:
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace")


# From the page to figures -----------------------------------------------------------------------


def _decode(pid: int, command: str, page: Any) -> ProcessFigures:
    shown_pools = [i for i, entry in enumerate(page.pools) if entry.entry == SHOWN]
    pool_of = {index: at for at, index in enumerate(shown_pools)}
    allocators = {
        i: pool_of.get(entry.pool, -1)
        for i, entry in enumerate(page.allocators)
        if entry.entry == SHOWN
    }
    tags = {
        i: _tag(entry, allocators.get(entry.allocator, -1))
        for i, entry in enumerate(page.tags)
        if entry.entry == SHOWN
    }
    pools = []
    for at, index in enumerate(shown_pools):
        mine = [page.allocators[i] for i, pool in allocators.items() if pool == at]
        pools.append(_pool(page.pools[index], mine))
    ranges = [_range(entry, tags.get(entry.tag)) for entry in page.ranges if entry.entry == SHOWN]
    return ProcessFigures(
        pid,
        command,
        page.start_ns / 1e9,
        tuple(pools),
        tuple(tags.values()),
        tuple(sorted(ranges, key=lambda each: each.address)),
    )


def _pool(entry: Any, allocators: list[Any]) -> PoolFigures:
    limits = [each.limit for each in allocators]
    return PoolFigures(
        driver=_text(entry.name),
        page_bytes=entry.page,
        budget_bytes=entry.budget,
        created_bytes=entry.created,
        peak_created_bytes=entry.peak_created,
        free_bytes=entry.free,
        stale_bytes=entry.stale,
        refused=entry.refused,
        torch_mapped_bytes=sum(each.mapped for each in allocators),
        torch_idle_bytes=sum(each.idle_pages for each in allocators) * entry.page,
        torch_limit_bytes=sum(limits) if limits and all(limits) else None,
        out_of_memory=sum(each.out_of_memory for each in allocators),
    )


def _tag(entry: Any, pool: int) -> TagFigures:
    return TagFigures(
        pool=pool,
        name=_text(entry.name),
        state=_STATES[min(entry.state, len(_STATES) - 1)],
        live_bytes=entry.live,
        peak_live_bytes=entry.peak_live,
        blocks=entry.blocks,
        mapped_bytes=entry.mapped,
        budget_bytes=entry.budget or None,
        allocations=entry.allocations,
    )


def _range(entry: Any, tag: TagFigures | None) -> RangeFigures:
    return RangeFigures(
        pool=-1 if tag is None else tag.pool,
        tag="" if tag is None else tag.name,
        address=entry.base,
        stream=entry.stream,
        kind=_KINDS[min(entry.kind, len(_KINDS) - 1)],
        reserved_bytes=entry.reserved,
        mapped_bytes=entry.mapped,
    )


def _text(name: bytes) -> str:
    return name.decode(errors="replace")
