"""Figures of an engine that nobody has to start, for tests of metrics and of the live page."""

from __future__ import annotations

from dataclasses import dataclass, field

from vattn.async_llm import LiveRequest
from vattn.engine_process.errors import EngineDeadError
from vattn.engine_process.messages import Facts, PageRows, Row, Stats
from vattn.kv.report import CacheStats
from vattn.metrics import EngineStats
from vattn.outputs import CompletionOutput, RequestOutput, Timings

FACTS = Facts(
    model="embedded", dtype="float32", device="cpu", vocab_size=512, max_model_len=64,
    max_num_seqs=4, max_num_batched_tokens=64, eos_token_ids=[2], generation_defaults={},
    generation_ignored=[], page_bytes=4096, slots=4, slot_pages=8, budget_bytes=1 << 20,
    enable_prefix_caching=True, scheduling_policy="fcfs", max_logprobs=20, attention_backend="sdpa",
)  # fmt: skip


def stats(steps: int, *, tokens: int = 0, maps: int = 0, pages: int = 4, adopted: int = 0) -> Stats:
    """Figures after so many steps: ``tokens`` in outputs, ``maps`` calls, live pages and so on."""
    size = FACTS.page_bytes
    return Stats(
        engine=EngineStats(
            num_running=1, num_waiting=2, num_preemptions=steps, num_steps=steps, prompt_tokens=0,
            generation_tokens=tokens, finished={}, prefix_cache_queries=10 * steps,
            prefix_cache_hits=steps, requests_reopened=0, requests_forked=0,
            requests_swapped_out=0, requests_swapped_in=0, swap_used_bytes=0, graphs_captured=0,
            steps_by_graph=0, cache=None, spec_decode_num_accepted_tokens_per_pos=(steps, 1),
        ),
        cache=CacheStats(
            open_slots=1, kept_slots=0, tokens=9, token_bytes=900, live_bytes=pages * size,
            shared_bytes=size, cover_bytes=size, stale_bytes=3 * size, kept_bytes=2 * size,
            scratch_bytes=0, pooled_bytes=5 * size, reserved_bytes=1 << 24, budget_bytes=1 << 20,
            page_bytes=size, pages_mapped=maps, pages_adopted=adopted, pages_aliased=0,
            pages_recycled=0, pages_reclaimed=0, copied_bytes=0, evicted_tokens=0, driver_calls={},
        ),
        pool={"created_bytes": 13 * size, "pages_created_total": 14, "pages_destroyed_total": 1,
              "peak_created_bytes": 14 * size},
        driver_calls={"map": (maps, maps * 1e-3), "unmap": (1, 1e-4)},
        step_seconds=0.01, step_tokens=1, monotonic_s=float(steps), requests=[(7, 0, 1, 5)],
    )  # fmt: skip


@dataclass
class FakeLLM:
    """What metrics and the live page ask of an AsyncLLM."""

    latest: Stats | None = None
    is_ready: bool = True
    restarts: int = 0
    last_error: EngineDeadError | None = None
    facts: Facts = FACTS
    requests: list[LiveRequest] = field(default_factory=list)
    maps: int = 0  # how many memory maps were asked for

    def stats(self) -> Stats | None:
        return self.latest

    def live_requests(self) -> list[LiveRequest]:
        return self.requests

    async def memory_map(self, max_cells: int = 256) -> PageRows:
        self.maps += 1
        return PageRows(4096, 4, 64, 1, [Row(2, 9, 0, 7, 0, bytes([0x81, 1, 2, 3, 0, 0]))])


def output(
    tokens: dict[int, list[int]],
    *,
    prompt: int = 8,
    cached: int = 0,
    reason: str | None = None,
    timings: Timings | None = None,
) -> RequestOutput:
    """Tokens of samples, as an engine tells them; with a reason it is the last output."""
    samples = [CompletionOutput(i, "", ids, None, reason, None) for i, ids in tokens.items()]
    found = timings or Timings()
    return RequestOutput("r", None, list(range(prompt)), samples, reason is not None, cached, found)
