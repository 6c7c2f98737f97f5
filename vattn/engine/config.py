"""Settings of an engine, checked where they enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vattn.config import parse_bytes, positive_int

Policy = Literal["fcfs", "priority"]
DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Names and meanings are vLLM's where it has the setting.

    Args:
        max_model_len: longest prompt and output together; None for the model's own limit.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: tokens computed in one step, over all requests.
        gpu_memory_utilization: share of the device's memory for everything, weights included; the
            KV cache may use what is left of it. On a CPU the device's memory is the host's. None
            for 0.9 of a GPU and for half of a host's free memory.
        kv_cache_memory_bytes: the KV cache's budget itself, as a number or text such as ``"4GiB"``.
        swap_space: host memory for preempted requests, in GiB; None for 4 beside a GPU and none
            on a CPU, where it would be the same memory.
        enable_prefix_caching: finished requests leave their K and V to those that begin alike.
        enable_chunked_prefill: a prompt may be computed in parts, beside requests that decode.
        scheduling_policy: ``"fcfs"`` or ``"priority"`` (smaller values first).
        attention_backend: by name; None for the first that can serve the model.
        page_bytes: of the KV cache; None for the driver's default.
        order: layout of the KV cache; None for what the backend and the device do best.
        layers_per_region: see :mod:`vattn.kv.layout`.
        strict: memory that is not mapped faults when it is touched (CPU only; for tests).
        prepare_ahead: map the next step's pages in the background, and admit one step ahead.
        seed: of requests without one.
    """

    max_model_len: int | None = None
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | str | None = None
    swap_space: float | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Policy = "fcfs"
    attention_backend: str | None = None
    page_bytes: int | None = None
    order: Literal["token", "head"] | None = None
    layers_per_region: int | None = None
    strict: bool = False
    prepare_ahead: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "page_bytes", "layers_per_region"):
            if getattr(self, name) is not None:
                positive_int(getattr(self, name), name, ", or None")
        positive_int(self.max_num_seqs, "max_num_seqs")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization={share!r} must be above 0 and at most 1")
        if share is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("give gpu_memory_utilization or kv_cache_memory_bytes, not both")
        if self.kv_cache_memory_bytes is not None:
            parse_bytes(self.kv_cache_memory_bytes, "kv_cache_memory_bytes")
        if self.swap_space is not None and not 0 <= self.swap_space < 2**20:
            raise ValueError(f"swap_space={self.swap_space!r} must be a number of GiB, 0 or more")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ValueError(
                f'scheduling_policy={self.scheduling_policy!r} must be "fcfs" or "priority"'
            )
        if self.order not in (None, "token", "head"):
            raise ValueError(f'order={self.order!r} must be "token" or "head"')
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be at least 0 and below 2**63")

    @property
    def step_tokens(self) -> int:
        """Most tokens of one step: as asked for, else a default that every sequence fits into."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)
