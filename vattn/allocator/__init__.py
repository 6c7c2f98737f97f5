"""All of PyTorch's CUDA memory, or named parts of it, from the pages that KV caches use.

* :func:`enable`: before the first CUDA tensor; ``python -m vattn.run script.py`` for a program that
  is not to be changed.
* ``with pool(tag=...)``: a part of a program, named.
* :func:`pause` and :func:`resume` a tag, :func:`set_budget`, :func:`trim`, :func:`stats`,
  :func:`page_pool`.
* :func:`snapshot` for PyTorch's memory page, :func:`record_trace` for replays.

See docs/allocator.md.
"""

from vattn.allocator.enable import disable, enable, is_enabled
from vattn.allocator.event_trace import Event, Trace, record_trace, save_trace, trace
from vattn.allocator.memory_snapshot import dump_snapshot, snapshot
from vattn.allocator.pausing import is_paused, pause, resume
from vattn.allocator.report import AllocatorStats, stats
from vattn.allocator.tags import page_pool, pool, set_budget, trim

__all__ = [
    "AllocatorStats",
    "Event",
    "Trace",
    "disable",
    "dump_snapshot",
    "enable",
    "is_enabled",
    "is_paused",
    "page_pool",
    "pause",
    "pool",
    "record_trace",
    "resume",
    "save_trace",
    "set_budget",
    "snapshot",
    "stats",
    "trace",
    "trim",
]
