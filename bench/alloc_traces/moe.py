"""Training a mixture of experts: what each expert asks for follows the routing of its tokens."""

from __future__ import annotations

import torch

from bench.alloc_traces.models import build_model, mixtral_config
from bench.alloc_traces.program import Marks, Workload
from bench.alloc_traces.training import draw_tokens, make_optimizer, train_step, varying_lengths

_STEPS = 12
_SEQUENCES = 2
_LONGEST_TOKENS = 384


def moe(device: torch.device, marks: Marks) -> object:
    model = build_model(mixtral_config(), device)
    optimizer = make_optimizer(model)
    for length in varying_lengths(_STEPS, _LONGEST_TOKENS, seed=1):
        marks.iteration()
        train_step(model, optimizer, draw_tokens((_SEQUENCES, length), device))
    return model, optimizer


MOE = (
    Workload(
        "moe",
        moe,
        "AdamW steps of a mixture of 8 experts in fp32, a loop over the experts; batches vary",
        {"steps": _STEPS, "sequences": _SEQUENCES, "tokens": f"16 to {_LONGEST_TOKENS}"},
    ),
)
