"""Prints, as JSON, each attention backend and why it cannot be used here; null where it can."""

from __future__ import annotations

import json

import torch

from bench.provenance import gpu_missing
from vattn.attention.base import AttentionSpec
from vattn.attention.operators import Unavailable
from vattn.attention.select import BACKENDS

# The attention of Llama-3-8B.
SPEC = AttentionSpec(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, scale=128**-0.5)


def find() -> dict[str, str | None]:
    device = torch.device("cpu" if gpu_missing() else "cuda")
    found: dict[str, str | None] = {}
    for name, kind in BACKENDS.items():
        found[name] = kind.refusal(SPEC, device)
        if found[name] is None:
            try:
                kind.create([SPEC], device)
            except Unavailable as error:
                found[name] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(find()))
