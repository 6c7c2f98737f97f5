"""The model and the caches of the cache benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

import vattn
from bench.common import Json

KINDS = ("dynamic", "static", "virtual")


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and how much of it is cached."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    batch: int
    tokens: int
    steps: int  # decoded after the tokens; the static cache has room for just these
    chunk: int  # tokens of one prefill step, over the whole batch
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def capacity(self) -> int:
        return self.tokens + self.steps

    @property
    def token_bytes(self) -> int:
        """K and V of one token in fp32."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.tokens}"

    def as_json(self) -> Json:
        return asdict(self)


def make_model(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.capacity,
        # Large enough that attention decides the next token.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(shape.seed)
    model: Any = LlamaForCausalLM(config)
    return model.eval()  # type: ignore[no-any-return]


def make_cache(kind: str, model: LlamaForCausalLM, shape: Shape, device: str = "cpu") -> Cache:
    makers: dict[str, Callable[[], Cache]] = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=shape.capacity),
        "virtual": lambda: vattn.VirtualCache(model.config, max_tokens=shape.capacity),
    }
    return makers[kind]()


def prompt(shape: Shape) -> torch.Tensor:
    """``[batch, tokens]`` random token ids."""
    generator = torch.Generator().manual_seed(shape.seed)
    return torch.randint(4096, (shape.batch, shape.tokens), generator=generator)


def forward(model: LlamaForCausalLM, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Next token of each row, ``[batch, 1]``, after ``ids`` ``[batch, n]``."""
    out: Any = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]


def fill_randomly(cache: Cache, shape: Shape) -> None:
    """Fills a cache through ``update`` with K and V that depend on the shape alone.

    What decoding costs depends on their shapes, not on where they come from, and a model takes
    minutes to compute 16K tokens on a CPU.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    step = max(1, shape.chunk // shape.batch)
    # One buffer for all: what is measured is the cache, not the malloc around it.
    kv = torch.empty(2, shape.batch, shape.kv_heads, step, shape.head_dim)
    for start in range(0, shape.tokens, step):
        n = min(step, shape.tokens - start)
        for layer in range(shape.layers):
            k, v = kv.normal_(generator=generator)[..., :n, :]
            cache.update(k, v, layer)
