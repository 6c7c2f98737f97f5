"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment.

    ``num_running`` and ``num_waiting`` are requests now; the rest counts since the start. Hits and
    queries of the prefix cache are counted in prompt tokens. ``steps_by_graph`` are those that were
    launched as one CUDA graph. ``beams_moved`` counts beams that went on where another had been, in
    a slot of their own; ``requests_forked`` has those that were made. ``cache`` holds the figures
    of the KV cache (:class:`vattn.kv.report.CacheStats`).

    Of speculation: how often a request had drafts that were verified, how many these were, how many
    of them became tokens of an output, and this for each position among the drafts.
    """

    num_running: int
    num_waiting: int
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]
    prefix_cache_queries: int
    prefix_cache_hits: int
    requests_reopened: int
    requests_forked: int
    requests_swapped_out: int
    requests_swapped_in: int
    swap_used_bytes: int
    graphs_captured: int
    steps_by_graph: int
    cache: Any
    beams_moved: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_num_accepted_tokens_per_pos: tuple[int, ...] = ()
