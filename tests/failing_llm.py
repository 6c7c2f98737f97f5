"""LLMs for AsyncLLM's ``llm_factory`` whose engine fails on purpose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import vattn

FAILS = "the step was told to fail"
# Prompts that begin with these token ids:
BREAKS_STEP = 77  # the first forward pass that has one raises
BREAKS_NUMBERS = 78  # K and V become NaN
STARTS = "VATTN_TEST_STARTS"  # a file, by this variable: each start adds a byte


def make(model: str, **settings: Any) -> vattn.LLM:
    """One that fails for some prompts."""
    llm = vattn.LLM(model, **settings)
    scheduler, cache = llm.engine.scheduler, llm.engine.storage.cache
    schedule, run = scheduler.schedule, llm.engine.runner.run
    planned: list[Any] = []

    def noted() -> Any:
        planned[:] = [schedule()]
        return planned[0]

    def fails(batch: Any) -> Any:
        first = {request.slot: request.prompt_ids[0] for request in planned[0].sampling}
        if BREAKS_STEP in first.values():
            raise RuntimeError(FAILS)
        logits = run(batch)
        for slot, token in first.items():
            if token == BREAKS_NUMBERS:
                for layer in range(len(cache.specs)):
                    for tensor in cache.view(slot, layer):  # type: ignore[attr-defined]
                        tensor.fill_(float("nan"))
        return logits

    scheduler.schedule = noted  # type: ignore[method-assign]
    llm.engine.runner.run = fails  # type: ignore[method-assign]
    return llm


def make_once(model: str, **settings: Any) -> vattn.LLM:
    """One that can be made once, as if its model were removed then."""
    starts = Path(os.environ[STARTS])
    if starts.exists():
        raise ValueError("the model is gone")
    starts.write_bytes(b".")
    return vattn.LLM(model, **settings)
