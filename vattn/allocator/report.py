"""What an allocator does, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vattn import _core
from vattn.allocator.which import allocator_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AllocatorStats:
    """Figures of one device's allocator.

    Bytes: ``live`` is what tensors hold, each rounded up to 512; ``physical`` the pages mapped for
    them and for what is cached; of it ``idle`` could serve others at once or after an event.
    ``pool`` is all physical memory, KV caches' too, of at most ``budget``; ``limit`` is what
    ``torch.cuda.set_per_process_memory_fraction`` set, 0 for none.

    Counts: ``allocations`` and ``out_of_memory`` errors so far; ``growths``: requests that nothing
    mapped could hold; ``pages_moved`` from one address to another; ``pending_blocks``: freed, but
    still in use by other streams; ``bad_frees``: refused ones of the process, by kind.
    """

    live_bytes: int
    peak_live_bytes: int
    physical_bytes: int
    peak_physical_bytes: int
    idle_bytes: int
    pool_bytes: int
    budget_bytes: int
    limit_bytes: int
    page_bytes: int
    live_blocks: int
    allocations: int
    out_of_memory: int
    growths: int
    pages_moved: int
    pending_blocks: int
    bad_frees: dict[str, int]


def stats(device: str | torch.device | int | None = None) -> AllocatorStats:
    """Figures of this moment.

    Args:
        device: None for the current one.

    Raises:
        RuntimeError: no allocator is in charge of the device, or nothing was allocated on it yet.
    """
    allocator = allocator_of(device)
    figures, pool = allocator.figures(), allocator.pool.stats()
    everything = figures["all"]
    return AllocatorStats(
        live_bytes=everything["allocated_bytes"]["current"],
        peak_live_bytes=everything["allocated_bytes"]["peak"],
        physical_bytes=everything["reserved_bytes"]["current"],
        peak_physical_bytes=everything["reserved_bytes"]["peak"],
        idle_bytes=figures["idle_bytes"],
        pool_bytes=pool["created_bytes"],
        budget_bytes=pool["budget_bytes"],
        limit_bytes=figures["limit_bytes"],
        page_bytes=figures["page_bytes"],
        live_blocks=everything["allocation"]["current"],
        allocations=everything["allocation"]["allocated"],
        out_of_memory=figures["num_ooms"],
        growths=figures["growths"],
        pages_moved=figures["pages_moved"],
        pending_blocks=figures["pending_blocks"],
        bad_frees=_core.torch_entry_errors(),
    )
