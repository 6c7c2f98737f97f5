"""A program that knows nothing of vattn: it trains a small Llama and lets it write.

    python train.py DEVICE

Prints one line of JSON: for each dtype the loss of every step, a sum over the trained weights and
the tokens, and what PyTorch calls its allocator. Two runs that differ in nothing but where memory
comes from have to print the same.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums each time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

VOCABULARY = 1024
LENGTHS = (64, 200, 33, 128, 256, 16, 190, 96)
NEW_TOKENS = 24


def make_model(device: str, dtype: torch.dtype) -> Any:
    wide = 512 if device == "cuda" else 128
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=wide,
        intermediate_size=2 * wide,
        num_hidden_layers=4 if device == "cuda" else 2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    # Not every fused kernel adds in a fixed order in its backward pass.
    return make(config, attn_implementation="eager").to(device=device, dtype=dtype)


def run(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Losses, weights and tokens of one training."""
    model = make_model(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for length in LENGTHS:
        tokens = torch.randint(1, VOCABULARY, (4, length)).to(device)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    prompt = torch.randint(1, VOCABULARY, (3, 9)).to(device)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {"losses": losses, "weights": weights, "tokens": written.tolist()}


def main() -> None:
    device = sys.argv[1]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    found: dict[str, Any] = {
        str(dtype): run(device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    if device == "cuda":
        found["allocator"] = torch.cuda.memory.get_allocator_backend()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
