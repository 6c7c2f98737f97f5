"""Settings of an engine, checked where they enter."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from vattn.config import parse_bytes, positive_int
from vattn.engine.eviction import EvictionPolicy
from vattn.engine.ranks import Policy, is_policy
from vattn.engine.speculation.config import parse_speculative

_BOOLEANS = (
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "strict",
    "prepare_ahead",
    "enforce_eager",
)
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
        scheduling_policy: ``"fcfs"``, ``"priority"`` (smaller values first), or a function that is
            given each new request and returns a number, or a tuple of numbers, as its rank: it goes
            first whose is smallest, as by priority. A request that it fails for is refused.
        eviction_policy: which finished requests are kept for others to share, and which of them are
            forgotten first; see :class:`vattn.engine.eviction.EvictionPolicy`. None: all of them,
            and those used longest ago.
        attention_backend: by name; None for the first that can serve the model.
        page_bytes: of the KV cache; None for the driver's default.
        order: layout of the KV cache; None for what the backend and the device do best.
        layers_per_region: see :mod:`vattn.kv.layout`.
        strict: memory that is not mapped faults when it is touched (CPU only; for tests).
        enforce_eager: no CUDA graphs and no compiled model: every kernel is launched by itself.
        cudagraph_capture_sizes: numbers of decoding sequences for which CUDA graphs are captured;
            None for a table up to ``max_num_seqs``.
        compile_model: the model around its attention goes through ``torch.compile``; None for what
            was measured to be faster on the device.
        async_scheduling: the next step is scheduled and launched before the tokens of the last one
            have arrived; None for yes on a GPU, unless it speculates, and no on a CPU, where
            nothing runs beside it.
        prepare_ahead: map the next step's pages in the background, and admit one step ahead.
        speculative_config: guess tokens and verify several in one step, as in
            ``{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}`` or
            ``{"model": "a/draft-model", "num_speculative_tokens": 5}``; see
            :class:`vattn.engine.speculation.config.SpeculativeConfig`. None for no guessing.
        max_logprobs: most that a request may ask for by ``logprobs`` and ``prompt_logprobs``; -1
            for no limit, the whole vocabulary included. Each takes about 200 bytes of the host's
            memory for each token, so that one request could take all of it.
        seed: of requests without one; None counts as 0.

    Raises:
        ValueError: a value of another type or out of range; the message names it and what it may
            be.
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
    eviction_policy: EvictionPolicy | None = None
    attention_backend: str | None = None
    page_bytes: int | None = None
    order: Literal["token", "head"] | None = None
    layers_per_region: int | None = None
    strict: bool = False
    enforce_eager: bool = False
    cudagraph_capture_sizes: Sequence[int] | None = None
    compile_model: bool | None = None
    async_scheduling: bool | None = None
    prepare_ahead: bool = True
    speculative_config: Any = None
    max_logprobs: int = 20
    seed: int | None = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "page_bytes", "layers_per_region"):
            if getattr(self, name) is not None:
                self._set(name, positive_int(getattr(self, name), name, ", or None"))
        self._set("max_num_seqs", positive_int(self.max_num_seqs, "max_num_seqs"))
        self._check_memory()
        self._check_choices()
        self._check_speculation()
        most = self.max_logprobs
        if isinstance(most, bool) or not hasattr(most, "__index__") or most < -1:
            raise ValueError(
                f"max_logprobs={most!r} must be a whole number, 0 or more, or -1 for no limit"
            )
        self._set("max_logprobs", operator.index(most))
        seed = 0 if self.seed is None else self.seed
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise ValueError(f"seed={seed!r} must be a whole number, or None for 0")
        self._set("seed", operator.index(seed))
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r} must be at least 0 and below 2**63")

    def _check_memory(self) -> None:
        share, swap = self.gpu_memory_utilization, self.swap_space
        if share is not None and not (_is_number(share) and 0 < share <= 1):
            raise ValueError(
                f"gpu_memory_utilization={share!r} must be a number above 0 and at most 1, such as "
                "0.9"
            )
        if share is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("give gpu_memory_utilization or kv_cache_memory_bytes, not both")
        if self.kv_cache_memory_bytes is not None:
            parse_bytes(self.kv_cache_memory_bytes, "kv_cache_memory_bytes")
        if swap is not None and not (_is_number(swap) and 0 <= swap < 2**20):
            raise ValueError(
                f"swap_space={swap!r} must be a number of GiB without a unit, 0 or more, such as 4"
            )

    def _check_choices(self) -> None:
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("compile_model", "async_scheduling"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True, False or None")
        if not is_policy(self.scheduling_policy):
            raise ValueError(
                f'scheduling_policy={self.scheduling_policy!r} must be "fcfs", "priority", or a '
                "function that ranks a request"
            )
        self._check_eviction()
        if self.attention_backend is not None and not isinstance(self.attention_backend, str):
            raise ValueError(
                f"attention_backend={self.attention_backend!r} must be the name of one, or None"
            )
        if self.order not in (None, "token", "head"):
            raise ValueError(f'order={self.order!r} must be "token" or "head"')
        self._check_graphs()

    def _check_eviction(self) -> None:
        if self.eviction_policy is None:
            return
        if not isinstance(self.eviction_policy, EvictionPolicy):
            raise ValueError(
                f"eviction_policy={self.eviction_policy!r} must be an object of a class made from "
                "vattn.EvictionPolicy, or None"
            )
        if not self.enable_prefix_caching:
            raise ValueError(
                f"eviction_policy={self.eviction_policy!r} decides what is kept for others, and "
                "enable_prefix_caching=False keeps nothing; drop one of them"
            )

    def _check_speculation(self) -> None:
        object.__setattr__(self, "speculative_config", parse_speculative(self.speculative_config))
        if self.speculative_config is not None and self.async_scheduling:
            raise ValueError(
                "async_scheduling=True launches a step before the tokens of the last one have "
                "arrived, and speculative_config guesses from these tokens; drop one of them"
            )

    def _check_graphs(self) -> None:
        sizes = self.cudagraph_capture_sizes
        if sizes is not None:
            if not isinstance(sizes, list | tuple | range):
                raise ValueError(
                    f"cudagraph_capture_sizes={sizes!r} must be a list of numbers of sequences"
                )
            known = [positive_int(size, "cudagraph_capture_sizes") for size in sizes]
            if not known or max(known) > self.max_num_seqs:
                raise ValueError(
                    f"cudagraph_capture_sizes={sizes!r} must be one number or more, none of them "
                    f"above max_num_seqs={self.max_num_seqs}; for no graphs use enforce_eager"
                )
            object.__setattr__(self, "cudagraph_capture_sizes", tuple(sorted(set(known))))
        if self.enforce_eager:
            if sizes is not None:
                raise ValueError("enforce_eager captures no graphs; drop cudagraph_capture_sizes")
            if self.compile_model:
                raise ValueError("enforce_eager compiles nothing; drop it or compile_model")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def step_tokens(self) -> int:
        """Most tokens of one step: as asked for, else a default that every sequence fits into."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)


def known_options(options: dict[str, Any], caller: str) -> dict[str, Any]:
    """The options, all of which are names of an :class:`EngineConfig`.

    Raises:
        TypeError: one of them is not.
    """
    known = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{caller} has no option {name!r}{hint}")
    return options


def _is_number(value: object) -> bool:
    """Whether it is finite and real; True and False are not meant as numbers."""
    number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    return number and math.isfinite(value)  # type: ignore[arg-type]
