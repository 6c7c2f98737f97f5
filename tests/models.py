"""Tiny random models of six families whose text depends on what they cache, and ways to run them.

Used by the tests of everything that generates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    StableLmConfig,
)

from vattn import PagePool, VirtualCache

VOCABULARY = 96
WINDOW = 24  # of the families with sliding windows
POSITIONS = 1024
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    # Tied to random embeddings, the head would repeat its input for ever.
    "tie_word_embeddings": False,
}


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def _gemma3() -> PreTrainedConfig:
    return Gemma3TextConfig(
        **_COMMON,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON),
    "gemma3": _gemma3,
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "gpt2": _gpt2,
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
}
FAMILIES = tuple(CONFIGS)


def make_model(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> Any:
    """A model with random weights, the same each time.

    Freshly initialised weights are so small that every text looks alike: whatever is cached, the
    same token wins. Here matrices are scaled to keep the size of what they are given, and attention
    is made sharp, so that losing one cached token changes what follows.
    """
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=attention
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue  # norms and biases
            if "embed" in name or "wte" in name:
                # Gemma multiplies embeddings by the square root of their size.
                scaled = config.model_type.startswith("gemma")
                weight.normal_(0.0, weight.shape[1] ** -0.5 if scaled else 1.0)
            elif "wpe" in name:
                weight.normal_(0.0, 0.5)
            else:
                weight.normal_(0.0, 1.7 * min(weight.shape[-2:]) ** -0.5)
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


@functools.cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of one of the FAMILIES; shared, so leave its weights alone."""
    return make_model(CONFIGS[family](), dtype=dtype)


def prompts(rows: int = 1, tokens: int = 40, *, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[rows, tokens]``, none of them the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=generator)


def padded_prompts(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded on the left, and their attention mask."""
    ids = prompts(3, tokens, seed=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, tokens // 2)):
        ids[row, :padding] = PAD
        mask[row, :padding] = 0
    return ids, mask


# Generating ---------------------------------------------------------------------------------------

MODES = ("greedy", "beam", "sample", "lookup", "chunked", "padded")
NEW = 40  # tokens that run() generates
PAGE = 4096  # 64 tokens of a head, or 16 of a layer in token order: every run crosses pages


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: with matrices this small, two only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def arguments(mode: str) -> dict[str, Any]:
    """What generate() is given in one of the MODES."""
    ids = prompts()
    if mode == "padded":
        ids, mask = padded_prompts()
        return {"input_ids": ids, "attention_mask": mask, "do_sample": False}
    if mode == "lookup":
        ids = ids.repeat(1, 2)
    options: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "beam": {"num_beams": 3, "do_sample": False},
        "sample": {"num_return_sequences": 3, "do_sample": True},
        "lookup": {"prompt_lookup_num_tokens": 4, "do_sample": False},
        "chunked": {"prefill_chunk_size": 16, "do_sample": False},
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options[mode]}


def strict_cache(config: PreTrainedConfig, **options: Any) -> VirtualCache:
    """A cache on memory that faults where nothing is mapped, with small pages."""
    options.setdefault("max_tokens", 400)
    options.setdefault("pool", PagePool(page_bytes=PAGE, strict=True))
    return VirtualCache(config, **options)


def stock_cache(config: PreTrainedConfig) -> DynamicCache:
    """What generate() makes itself."""
    return DynamicCache(config=config)


def run(model: Any, cache: Any, mode: str = "greedy", **options: Any) -> torch.Tensor:
    """What a model generates; the cache's invariants hold afterwards."""
    torch.manual_seed(11)
    options = {"max_new_tokens": NEW, **arguments(mode), **options}
    out: torch.Tensor = model.generate(past_key_values=cache, **options)
    if isinstance(cache, VirtualCache):
        cache.check()
    return out


# Without a model ----------------------------------------------------------------------------------

LAYERS, HEADS, DIM = _COMMON["num_hidden_layers"], _COMMON["num_key_value_heads"], 16


def states(rows: int, tokens: int, heads: int = HEADS, dim: int = DIM) -> torch.Tensor:
    """Random keys or values."""
    return torch.randn(rows, heads, tokens, dim)


def step(cache: Any, rows: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """One forward pass: every layer updated with random states; what the cache returned."""
    torch.manual_seed(seed)
    out: list[torch.Tensor] = []
    for layer in range(LAYERS):
        out.extend(cache.update(states(rows, tokens), states(rows, tokens), layer))
    if isinstance(cache, VirtualCache):
        cache.check()
    return out


# For the engine only ------------------------------------------------------------------------------

# What SDPA's own interface in transformers cannot compute, and arguments passed in other ways.
ENGINE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    **CONFIGS,
    "gemma2": lambda: Gemma2Config(
        **_COMMON,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "multi_query": lambda: LlamaConfig(**{**_COMMON, "num_key_value_heads": 1}),
    "stablelm": lambda: StableLmConfig(**{k: v for k, v in _COMMON.items() if k != "head_dim"}),
}


def engine_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one of the ENGINE_CONFIGS, with eager attention; the caller's own."""
    model = make_model(ENGINE_CONFIGS[family](), dtype=dtype, attention="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(0.0, 2.0)
    return model
