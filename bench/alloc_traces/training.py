"""Training a dense decoder, with batches of varying lengths and with all batches the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.alloc_traces.models import VOCABULARY, build_model, llama_config
from bench.alloc_traces.program import Marks, Workload

_SEQUENCES = 2
_VARYING_STEPS = 24
_LONGEST_TOKENS = 768
_STEADY_STEPS = 12
_STEADY_TOKENS = 384


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW as it is on a GPU by default: lists of tensors at once, with lists of temporaries."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)


def train_step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step on a batch.

    Args:
        model: a causal language model.
        optimizer: of its parameters.
        tokens: int64 ``[sequences, tokens]``, also the labels.
    """
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def draw_tokens(count: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Random tokens, int64 ``[sequences, tokens]``; drawn where they are used."""
    return torch.randint(1, VOCABULARY, count, device=device)


def varying_lengths(steps: int, longest: int, seed: int = 0) -> list[int]:
    """Tokens of each step's longest sequence: log-normal, of 16 to ``longest``."""
    draws = np.random.default_rng(seed).lognormal(np.log(longest / 3), 0.7, steps)
    return [int(length) for length in np.clip(draws, 16, longest)]


def train_varying(device: torch.device, marks: Marks) -> object:
    model = build_model(llama_config(), device)
    optimizer = make_optimizer(model)
    for length in varying_lengths(_VARYING_STEPS, _LONGEST_TOKENS):
        marks.iteration()
        train_step(model, optimizer, draw_tokens((_SEQUENCES, length), device))
    return model, optimizer


def train_steady(device: torch.device, marks: Marks) -> object:
    model = build_model(llama_config(), device)
    optimizer = make_optimizer(model)
    for _ in range(_STEADY_STEPS):
        marks.iteration()
        train_step(model, optimizer, draw_tokens((_SEQUENCES, _STEADY_TOKENS), device))
    return model, optimizer


TRAINING = (
    Workload(
        "train_varying",
        train_varying,
        "AdamW steps of a dense decoder in fp32; each batch is as long as its longest sequence",
        {"steps": _VARYING_STEPS, "sequences": _SEQUENCES, "tokens": f"16 to {_LONGEST_TOKENS}"},
    ),
    Workload(
        "train_steady",
        train_steady,
        "AdamW steps of a dense decoder in fp32; all batches have one shape",
        {"steps": _STEADY_STEPS, "sequences": _SEQUENCES, "tokens": _STEADY_TOKENS},
    ),
)
