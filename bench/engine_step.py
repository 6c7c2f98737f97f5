"""Whole steps of an engine whose model costs nothing: what everything around the model costs.

The real scheduler, memory manager (with prefix caching and the mapper), packing, sampling of a tiny
vocabulary and output processing; pages are mapped as the sequences grow.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from vattn.attention.base import AttentionSpec
from vattn.engine.batch import StepBatch
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.kv.layout import LayerSpec
from vattn.sampling_params import SamplingParams

_VOCABULARY = 8
_HEADS, _DIM = 2, 64


class _NoModel:
    """What an engine asks of a loaded model."""

    def __init__(self, max_positions: int) -> None:
        self.device = torch.device("cpu")
        self.model: Any = None
        self.dtype = torch.float16
        self.vocab_size = _VOCABULARY
        self.max_positions = max_positions
        self.eos_token_ids = frozenset({1})
        self.specs = [AttentionSpec(_HEADS, _HEADS, _DIM, self.dtype, 1.0)] * 2

    def layer_specs(self) -> list[LayerSpec]:
        return [LayerSpec(_HEADS, _DIM, self.dtype)] * 2


class _NoRunner:
    """Logits of token 5 for everybody."""

    def __init__(self, rows: int) -> None:
        self._logits = torch.zeros(rows, _VOCABULARY)
        self._logits[:, 5] = 1.0

    def run(self, batch: StepBatch) -> torch.Tensor:
        return self._logits[: len(batch.logit_rows)]

    def remember(self, batch: StepBatch, token_ids: torch.Tensor) -> None:
        pass


def step_times(
    load: str, sequences: int, steps: int, warmup: int, prompt_tokens: int
) -> tuple[list[float], list[int], int]:
    """Microseconds of each engine step, sequences running in each, and how many ended."""
    longest = prompt_tokens + steps + warmup + 2
    model: Any = _NoModel(longest)
    config = EngineConfig(
        max_num_seqs=sequences,
        max_num_batched_tokens=sequences * prompt_tokens,
        kv_cache_memory_bytes="1GiB",
    )
    engine = Engine(model, config)
    engine.runner = _NoRunner(sequences)  # type: ignore[assignment]
    made = 0

    def refill(requests: int) -> None:
        nonlocal made
        for _ in range(requests):
            new = longest - prompt_tokens
            if load == "churn":  # 32 to 287 new tokens, spread evenly
                new = min(new, 32 + 89 * made % 256)
            params = SamplingParams(temperature=0, max_tokens=new)
            prompt = [made // 8**i % 8 for i in range(prompt_tokens)]
            (request,) = engine.make_requests(str(made), prompt, params)
            engine.add(request)
            made += 1

    refill(sequences + (sequences // 8 if load == "churn" else 0))
    times, running, ends = [], [], 0
    gc.collect()
    for i in range(warmup + steps):
        start = time.perf_counter()
        news = engine.step()
        elapsed = time.perf_counter() - start
        ended = sum(request.finished for request in news)
        refill(ended if load == "churn" else 0)
        if i >= warmup:
            times.append(elapsed * 1e6)
            running.append(len(news))
            ends += ended
    engine.close()
    return times, running, ends
