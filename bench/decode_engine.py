"""Whole steps of an engine in its steady state: everybody decodes, nobody comes or goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from unittest import mock

import numpy as np

from bench.common import Json, quartiles
from bench.model_args import quantiles
from bench.steps import Mode
from vattn.engine import setup
from vattn.engine.config import EngineConfig
from vattn.engine.engine import Engine
from vattn.hf.compiled import CompiledModel
from vattn.hf.model import LoadedModel
from vattn.sampling_params import SamplingParams

# Steps in which the last prompts may still be computed while the first sequences decode.
_SKEW_STEPS = 512
_WARMUP = 8


def longest(context: int, steps: int) -> int:
    """Tokens of a sequence at its end, at most."""
    return context + _SKEW_STEPS + steps


def engine_steps(
    loaded: LoadedModel,
    mode: Mode,
    forward: CompiledModel | None,
    point: tuple[int, int],
    steps: int,
    backend: str | None,
) -> Json:
    """Times from one return of ``Engine.step`` to the next, with a batch of equal contexts.

    Args:
        loaded: the model.
        mode: how the engine launches.
        forward: the compiled model, if the mode is to use one: the engine compiles no other.
        point: batch, and tokens of each prompt.
        steps: to time.
        backend: by name; None for the engine's choice.

    Raises:
        AssertionError: a request failed, or a step gave other than one token to each.
    """
    batch, context = point
    config = EngineConfig(
        max_num_seqs=batch,
        max_model_len=longest(context, steps),
        max_num_batched_tokens=max(8192, batch),
        cudagraph_capture_sizes=[batch] if mode.graphs else None,
        attention_backend=backend,
        **mode.engine_options(),
    )
    with mock.patch.object(setup, "model_forward", return_value=forward):
        engine = Engine(loaded, config)
    try:
        requests = []
        random = np.random.default_rng(0)
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=_SKEW_STEPS + steps)
        for i in range(batch):
            prompt = random.integers(0, loaded.vocab_size, context).tolist()
            requests += engine.make_requests(str(i), prompt, params)
            engine.add(requests[-1])
        while not all(len(request.output_ids) >= _WARMUP for request in requests):
            engine.step()
            assert not any(request.finished for request in requests), requests[0].error
        before = statistics.mean(request.length for request in requests)
        times = []
        last = time.perf_counter()
        for _ in range(steps):
            news = engine.step()
            now = time.perf_counter()
            times.append((now - last) * 1e6)
            last = now
            assert len(news) == batch, f"{len(news)} of {batch} sequences got a token"
        assert not any(request.finished for request in requests), requests[0].error
        graphs = asdict(engine.runner.graph_stats)
    finally:
        engine.close()
    low, high = quartiles(times)
    step_us = statistics.median(times)
    return {
        "step_us": step_us,
        "step_low_us": low,
        "step_high_us": high,
        "p99_us": quantiles(times)["p99"],
        "tokens_per_s": batch / step_us * 1e6,
        "context_mean": before + steps / 2,
        "steps": steps,
        "asynchronous": engine.is_async,
        "graphs": graphs,
    }
