"""What a transformers config says about the layers of a cache, and which of them are supported."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from vattn.hf.compat import NOTHING, layer_types

# Layers that store nothing read what an earlier one stored (num_kv_shared_layers), or have no
# attention. Chunked attention caches like a window of the chunk's size; only masks differ.
_FULL = "full_attention"
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# Recurrent or segment memory that their configs report as full attention.
_OWN_MEMORY = ("reformer", "rwkv", "xlnet", "xlstm")

_REMEDY = (
    "VirtualCache holds the K and V of attention layers only; leave past_key_values out, and "
    "generate() makes the cache that this model needs"
)


@dataclass(frozen=True)
class LayerPlan:
    """One layer that stores K and V.

    ``window`` is None for full attention. ``expected`` is ``(kv_heads, head_dim)`` where the config
    tells: models compute it in ways of their own, so it mostly says which layers are alike.
    """

    window: int | None
    expected: tuple[int, int] | None


def read_layers(config: PreTrainedConfig) -> list[LayerPlan | None]:
    """The layers of a decoder; None for those that store nothing.

    Raises:
        TypeError: not a config.
        ValueError: an encoder-decoder model, or a layer that keeps something else than K and V.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"expected a model's config, got {type(config).__name__}; pass model.config"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model: {_REMEDY}")
    decoder = config.get_text_config(decoder=True)
    if decoder.model_type in _OWN_MEMORY:
        raise ValueError(f"{decoder.model_type} keeps a memory of its own kind: {_REMEDY}")
    try:
        types = layer_types(decoder)
    except AttributeError as error:
        raise ValueError(f"{decoder.model_type} does not tell its layers: {error}") from error
    plans: list[LayerPlan | None] = []
    for index, kind in enumerate(types):
        if kind == NOTHING:
            plans.append(None)
            continue
        if kind != _FULL and kind not in _WINDOWS:
            raise ValueError(f"layer {index} of {decoder.model_type} is of type {kind}: {_REMEDY}")
        layer, window = decoder.per_layer_config[index], None
        if kind in _WINDOWS:
            window = getattr(layer, _WINDOWS[kind], None)
            if not isinstance(window, int) or window <= 0:
                raise ValueError(
                    f"layer {index} of {decoder.model_type} is of type {kind} with a window of "
                    f"{window!r} tokens; set {_WINDOWS[kind]} in the config, or make it {_FULL}"
                )
        plans.append(LayerPlan(window, _expected_shape(layer)))
    if not any(plans):
        raise ValueError(f"{decoder.model_type} has no layer with attention: {_REMEDY}")
    return plans


def longest_sequence(config: PreTrainedConfig) -> int:
    """The number of positions that a model was made for.

    Raises:
        ValueError: the config does not say.
    """
    decoder = config.get_text_config(decoder=True)
    positions = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        raise ValueError(
            f"the config of {decoder.model_type} gives no max_position_embeddings; pass max_tokens"
        )
    return positions


def _expected_shape(layer: PreTrainedConfig) -> tuple[int, int] | None:
    heads = getattr(layer, "num_attention_heads", None)
    size = getattr(layer, "head_dim", None)
    if size is None and heads and getattr(layer, "hidden_size", None):
        size = layer.hidden_size // heads
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return (kv_heads, size) if kv_heads and size else None
