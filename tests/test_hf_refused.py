"""Models that the engine cannot serve are refused when they are loaded, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    Gemma3nTextConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
    ViTConfig,
)

from tests.models import _COMMON, engine_model
from vattn.hf.checks import check_model
from vattn.hf.model import ModelError, load_model

# By the config alone ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "mamba": (MambaConfig, "is of type linear_attention; .* not state-space"),
    "jamba": (JambaConfig, "is of type linear_attention; .* not state-space"),
    "qwen3_next": (Qwen3NextConfig, "is of type linear_attention"),
    "rwkv": (RwkvConfig, "keeps a state of its own kind"),
    "t5": (T5Config, "encoder-decoder"),
    "deepseek_v3": (DeepseekV3Config, "multi-head latent attention"),
    "llama4": (Llama4TextConfig, "layer 0 of llama4_text has chunked attention"),
    "gemma3n": (Gemma3nTextConfig, "15 layers that share the K and V of others"),
    "vit": (ViTConfig, "not a model that generates text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_config_that_is_refused(tmp_path: Path, kind: str) -> None:
    """By its config alone: there are no weights to be read."""
    make, message = REFUSED[kind]
    make().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


# When it is looked at ----------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2}
UNREACHABLE: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "bloom": (lambda: BloomConfig(**SMALL, n_layer=1), "does not use the attention interface"),
    "falcon": (
        lambda: FalconConfig(**SMALL, num_hidden_layers=1),
        "does not use the attention interface",
    ),
    "mpt": (
        lambda: MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=32, max_seq_len=32),
        "does not use the attention interface",
    ),
    "bert": (
        lambda: BertConfig(**SMALL, num_hidden_layers=1, intermediate_size=32),
        "both directions",
    ),
    "diffllama": (
        lambda: DiffLlamaConfig(**{**_COMMON, "num_hidden_layers": 1}),
        "computes attention more than once",
    ),
    "causal no more": (lambda: LlamaConfig(**{**_COMMON, "is_causal": False}), "both directions"),
}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_a_model_that_is_refused(kind: str) -> None:
    make, message = UNREACHABLE[kind]
    model: Any = AutoModelForCausalLM.from_config(make())  # type: ignore[no-untyped-call]
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=message):
        load_model(model)
    assert model.config._attn_implementation == before
    model(torch.tensor([[1, 2]]))  # as good as before


def change_forward(module: Any, change: Callable[..., Any]) -> None:
    """Puts ``change(forward, *args, **kwargs)`` in place of a module's forward."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: change(forward, *args, **kwargs)


def first_attention(model: Any, **changes: Any) -> None:
    """Makes the first layer's attention pass further arguments."""
    change_forward(
        model.model.layers[0].self_attn,
        lambda f, *args, **kwargs: f(*args, **{**kwargs, **changes}),
    )


def without_positions(model: Any) -> None:
    def forward(inner: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    change_forward(model.model, forward)


def mixing_neighbours(model: Any) -> None:
    change_forward(
        model.model.layers[0].mlp, lambda f, x: f(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))
    )


def with_a_mask_of_its_own(model: Any) -> None:
    first_attention(model, attention_mask=torch.zeros(1, 1, 3, 3))


def with_a_prefix(model: Any) -> None:
    """The first four tokens see each other."""

    def forward(inner: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            rule = attention_mask.rule
            attention_mask.rule = lambda b, h, q, k: rule(b, h, q, k) | ((q < 4) & (k < 4))
        return inner(*args, attention_mask=attention_mask, **kwargs)

    change_forward(model.model.layers[0].self_attn, forward)


def in_chunks(model: Any) -> None:
    def forward(inner: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            rule = attention_mask.rule
            attention_mask.rule = lambda b, h, q, k: rule(b, h, q, k) & (q // 64 == k // 64)
        return inner(*args, attention_mask=attention_mask, **kwargs)

    change_forward(model.model.layers[0].self_attn, forward)


def by_table(model: Any) -> None:
    def forward(inner: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            table = torch.ones(3, dtype=torch.bool)
            attention_mask.rule = lambda b, h, q, k: table[q] & table[k]
        return inner(*args, attention_mask=attention_mask, **kwargs)

    change_forward(model.model.layers[0].self_attn, forward)


def with_uneven_heads(model: Any) -> None:
    """Three heads of K and V for four of Q."""
    for projection in (
        model.model.layers[0].self_attn.k_proj,
        model.model.layers[0].self_attn.v_proj,
    ):
        projection.weight = torch.nn.Parameter(torch.zeros(48, 64))


def with_unnumbered_layers(model: Any) -> None:
    model.model.layers[0].self_attn.layer_idx = None


CHANGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "positions": (without_positions, "does not go by position_ids"),
    "neighbours": (mixing_neighbours, "mixes neighbouring tokens"),
    "mask": (with_a_mask_of_its_own, "a mask of its own making"),
    "prefix": (with_a_prefix, "neither causal nor a sliding window"),
    "chunks": (in_chunks, "neither causal nor a sliding window"),
    "table": (by_table, "depends on more than positions"),
    "bias": (
        lambda model: first_attention(model, position_bias=torch.zeros(1, 4, 3, 3)),
        r"layer 0 \(LlamaAttention\) passes position_bias",
    ),
    "sinks": (lambda m: first_attention(m, s_aux=torch.zeros(3)), "not one per head"),
    "softcap": (lambda m: first_attention(m, softcap=torch.ones(1)), "computes its softcap anew"),
    "heads": (with_uneven_heads, "query heads must be a multiple of K's"),
    "numbers": (with_unnumbered_layers, "does not know which layer it is"),
    "failure": (
        lambda model: change_forward(model.model, lambda f, *args, **kwargs: 1 // 0),
        "cannot run a packed batch: integer division",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_that_computes_something_else(change: str) -> None:
    model = engine_model("llama")
    alter, message = CHANGED[change]
    alter(model)
    with pytest.raises(ModelError, match=message):
        load_model(model)
    assert model.config._attn_implementation == "eager"


def test_weights_that_are_not_finite() -> None:
    model = engine_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(ModelError, match=r"layer 1 .* computes NaN or infinity"):
        load_model(model)


def test_a_model_without_a_head() -> None:
    with pytest.raises(ModelError, match="LlamaModel gives no logits"):
        load_model(engine_model("llama").model)


def test_dropout_in_evaluation_mode() -> None:
    model = engine_model("llama")
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.1
    change_forward(attention, lambda f, *a, **k: (attention.train(), f(*a, **k))[1])
    with pytest.raises(ModelError, match=r"dropout 0\.1 in evaluation mode"):
        load_model(model)


def test_adapters_and_scattered_weights_are_refused() -> None:
    model = engine_model("llama")
    model.peft_config = {}
    with pytest.raises(ModelError, match="LoRA adapter loaded"):
        load_model(model)
    with torch.device("meta"):
        nowhere = AutoModelForCausalLM.from_config(LlamaConfig(**_COMMON))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="not in memory"):
        load_model(nowhere)
    places = [SimpleNamespace(device=f"cuda:{i}") for i in range(2)]
    spread = SimpleNamespace(parameters=lambda: places, buffers=list)
    with pytest.raises(ModelError, match="spread over cuda:0, cuda:1; more than one device"):
        check_model(spread)
