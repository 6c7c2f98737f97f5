"""The models that are recorded: random weights, made where they run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

VOCABULARY = 8192
POSITIONS = 4096

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": None,  # no token ends a text
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llama_config() -> LlamaConfig:
    """A dense decoder of 36 million parameters."""
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        **_COMMON,
    )


def mixtral_config() -> MixtralConfig:
    """A mixture of 8 experts, 2 per token, of 55 million parameters."""
    # A loop over the experts: the sizes of its tensors follow the routing.
    routed = {"experts_implementation": "eager", **_COMMON}
    return MixtralConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        **routed,
    )


def build_model(config: PreTrainedConfig, device: torch.device) -> Any:
    """A model in fp32 with random weights, the same ones each time."""
    torch.manual_seed(0)
    make_model: Any = AutoModelForCausalLM.from_config
    with device:
        return make_model(config, dtype=torch.float32, attn_implementation="sdpa")
