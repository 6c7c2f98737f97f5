"""What VirtualCache refuses, with the value and the remedy, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV32Config,
    FalconH1Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
    WhisperConfig,
)

from tests.models import CONFIGS, PAGE, prompts, states, step, strict_cache, tiny_model
from vattn import PagePool, VirtualCache


def small_cache(family: str = "llama", **options: Any) -> VirtualCache:
    return strict_cache(CONFIGS[family](), **options)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (T5Config, "t5 is an encoder-decoder model"),
        (WhisperConfig, "whisper is an encoder-decoder model"),
        (MambaConfig, "mamba is of type linear_attention"),
        (Qwen3NextConfig, "qwen3_next is of type linear_attention"),
        (FalconH1Config, "falcon_h1 is of type hybrid"),
        (DeepseekV32Config, r"deepseek_v32 is of type (indexed|deepseek_sparse)_attention"),
        (RwkvConfig, "rwkv keeps a memory of its own"),
    ],
)
def test_models_of_other_kinds_are_refused(config: type[PreTrainedConfig], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*leave past_key_values out"):
        VirtualCache(config(), max_tokens=100)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be a positive integer"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"page_bytes": -1}, "page_bytes=-1"),
        ({"layers_per_region": 0}, "layers_per_region=0"),
        ({"order": "layer"}, "order='layer'"),
        ({"budget_bytes": "much"}, "budget_bytes='much' is not a size"),
        ({"budget_bytes": 0}, "budget_bytes=0 must be a positive integer"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VirtualCache(LlamaConfig(), **{"max_tokens": 100, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_bytes": 1000}, "page.*granularity"),
        ({"budget_bytes": 1000}, "budget"),
        ({"kv_tile_tokens": 0}, "kv_tile_tokens"),
        ({"max_tokens": 2**31}, "lower max_seqs or max_tokens"),
        ({"dtype": torch.bfloat16}, r"computes K and V in torch.float32.*dtype=torch.bfloat16"),
    ],
)
def test_settings_that_need_the_model_are_refused_at_its_first_tokens(
    options: dict[str, Any], named: str
) -> None:
    cache = VirtualCache(LlamaConfig(), **{"max_tokens": 100, **options})
    with pytest.raises(ValueError, match=named):
        cache.update(states(1, 4), states(1, 4), 0)
    assert cache.kv is None
    assert cache.get_seq_length() == 0


def test_pool_and_its_settings() -> None:
    with pytest.raises(ValueError, match="belong to the pool"):
        VirtualCache(LlamaConfig(), pool=PagePool(), page_bytes=PAGE)
    with pytest.raises(TypeError, match=r"pass model\.config"):
        VirtualCache(tiny_model("llama"))
    with pytest.raises(ValueError, match="bloom gives no max_position_embeddings; pass max_tokens"):
        VirtualCache(BloomConfig())


def test_one_device_only() -> None:
    cache = small_cache()
    elsewhere = states(1, 4).to("meta")
    cache.update(states(1, 4), states(1, 4), 0)
    with pytest.raises(ValueError, match=r"layer 1 computes on meta.*put the whole model on it"):
        cache.update(elsewhere, elsewhere, 1)
    with pytest.raises(ValueError, match="layer 0 computes on meta, but the cache is on cpu"):
        small_cache(device="cpu", pool=None).update(elsewhere, elsewhere, 0)


def test_head_size_that_kernels_would_pad() -> None:
    cache = small_cache()
    with pytest.raises(ValueError, match="head_dim=20 is not a multiple of 8"):
        cache.update(states(1, 4, dim=20), states(1, 4, dim=20), 0)


def test_values_that_do_not_belong_to_the_keys() -> None:
    cache = small_cache()
    with pytest.raises(ValueError, match="do not belong together"):
        cache.update(states(1, 4), states(1, 5), 0)
    with pytest.raises(ValueError, match="do not belong together"):
        cache.update(states(1, 4), states(1, 4).half(), 0)


def test_training_is_refused() -> None:
    model, cache = tiny_model("llama"), small_cache()
    with pytest.raises(ValueError, match=r"torch\.inference_mode\(\)"):
        model(prompts(), past_key_values=cache)
    assert cache.kv is None
    with torch.no_grad():
        model(prompts(), past_key_values=cache)


def test_crop_beyond_what_is_there() -> None:
    cache = small_cache("mistral")
    step(cache, 1, 200)
    step(cache, 1, 70)
    step(cache, 1, 1)
    with pytest.raises(ValueError, match=r"crop\(5\): give a negative number"):
        cache.crop(5)
    with pytest.raises(ValueError, match="sliding-window layer holds tokens from"):
        cache.crop(-120)
    assert cache.get_seq_length() == 271
    cache.crop(-500)  # everything, as in the stock cache
    assert cache.get_seq_length() == 0
    step(cache, 1, 5)


def test_layers_move_together() -> None:
    cache = small_cache()
    step(cache, 1, 5)
    layer: Any = cache.layers[0]
    for name in ("reset", "crop", "reorder_cache", "batch_select_indices", "offload"):
        with pytest.raises(TypeError, match="on the cache"):
            getattr(layer, name)(0)
    with pytest.raises(ValueError, match="no memory before"):
        small_cache().stats()
    with pytest.raises(ValueError, match="no memory before"):
        small_cache().memory_map()


def test_a_forward_that_was_cut_short_is_not_continued() -> None:
    """Ctrl-C after the first layer: the others would stay a token behind for good."""
    cache = small_cache()
    step(cache, 1, 5)
    for _ in range(2):  # the first layer of two steps, and nothing more
        cache.update(states(1, 1), states(1, 1), 0)
    with pytest.raises(ValueError, match=r"layer 1 holds 5 tokens.*reset\(\), or crop\(\)"):
        cache.update(states(1, 1), states(1, 1), 1)
    cache.crop(-2)
    step(cache, 1, 1)
    assert {cache.get_seq_length(layer) for layer in range(len(cache.layers))} == {6}
