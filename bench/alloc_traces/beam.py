"""Beam search: a cache that grows by a token and is reordered at every step."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from bench.alloc_traces.models import build_model, llama_config
from bench.alloc_traces.program import Marks, Workload
from bench.alloc_traces.training import draw_tokens

_BEAMS = 4
_BATCHES = ((3, 384, 40), (2, 640, 40), (4, 160, 40))  # prompts, tokens of each, tokens to generate


@torch.inference_mode()
def beam(device: torch.device, marks: Marks) -> object:
    model = build_model(llama_config(), device).eval()
    for prompts, tokens, new_tokens in _BATCHES:
        marks.iteration()
        inputs = draw_tokens((prompts, tokens), device)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=DynamicCache(config=model.config),
            num_beams=_BEAMS,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
    return model


BEAM = (
    Workload(
        "beam",
        beam,
        "beam search by generate with a DynamicCache, batch after batch, fp32",
        {"beams": _BEAMS, "prompts, tokens, new tokens": [list(batch) for batch in _BATCHES]},
    ),
)
