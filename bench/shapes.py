"""Models of real shapes with random weights, made where they run, and what a step of them reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from bench.common import Json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; ``tied``: the head is the embedding table."""

    name: str
    config: type[PreTrainedConfig]
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    rope_theta: float = 10000.0

    def as_json(self) -> Json:
        return asdict(self) | {"config": self.config.__name__}

    def kv_token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    def attention_flops(self, new: int, before: int = 0) -> int:
        """Multiplications and additions of causal attention of ``new`` tokens after ``before``."""
        pairs = new * before + new * (new + 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * pairs


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama3-8b", LlamaConfig, 32, 4096, 14336, 32, 8, 128, 128256, False, 500000.0),
        Shape("yi-6b", LlamaConfig, 32, 4096, 11008, 32, 4, 128, 64000, False, 5000000.0),
        Shape("qwen3-0.6b", Qwen3Config, 28, 1024, 3072, 16, 8, 128, 151936, True, 1000000.0),
        Shape("llama-8x512", LlamaConfig, 8, 512, 2048, 8, 4, 64, 4096, False),
        Shape("small-llama", LlamaConfig, 4, 256, 512, 8, 4, 32, 1024, False),
        Shape("small-qwen3", Qwen3Config, 4, 256, 1024, 4, 2, 64, 4096, False),
        Shape("tiny-llama", LlamaConfig, 2, 64, 128, 4, 2, 16, 256, False),
        Shape("tiny-qwen3", Qwen3Config, 2, 64, 128, 4, 2, 16, 256, True),
    )
}


def build_model(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    positions: int,
    seed: int = 0,
    initializer_range: float | None = None,
) -> Any:
    """A transformers model with random weights, drawn on the device; no token ends a text.

    Args:
        shape: of it.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the weights.
        positions: longest sequence in tokens.
        seed: of the weights.
        initializer_range: deviation of the weights; None for the library's, at which attention
            hardly ever decides the next token.
    """
    drawn = {} if initializer_range is None else {"initializer_range": initializer_range}
    make_config: Any = shape.config
    config = make_config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **drawn,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    return model.eval()


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, in numbers: ``layers`` are applied to every token."""

    total: int
    embedding: int  # of it; a step reads a row per token
    head: int  # applied to the tokens that get logits
    layers: int
    read_bytes: int  # that every step reads: all, but an embedding table that is not the head


def count_weights(model: Any) -> Weights:
    """Counts what a step reads; a tied head is read, so its table counts."""
    table: nn.Parameter = model.get_input_embeddings().weight
    head: nn.Parameter = model.get_output_embeddings().weight
    total = _numel(model.parameters())
    tied = table is head
    layers = total - table.numel() - (0 if tied else head.numel())
    read = layers + head.numel()
    return Weights(total, table.numel(), head.numel(), layers, read * table.element_size())


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())
