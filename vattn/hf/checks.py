"""What the engine cannot serve, told before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vattn.hf.compat import layer_types

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_LFS_POINTER = b"version https://git-lfs"

# Full and sliding layers keep K and V; "moe" and "mlp" layers of compat are "dummy", no attention.
_SERVED = ("full_attention", "sliding_attention", "dummy")
# Recurrent or segment memory that their configs report as full attention.
_OWN_MEMORY = ("reformer", "rwkv", "xlnet", "xlstm")


class ModelError(ValueError):
    """A model that is not there, not whole, or that the engine cannot serve; it says why."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error without line breaks, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Any error inside is the model's: a ModelError that begins with ``what``."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever it is, this model cannot be used
        raise ModelError(f"{what}: {one_line(error)}") from error


# Files --------------------------------------------------------------------------------------------


def find_directory(model: str | Path) -> Path | None:
    """The directory that a model's name stands for; None if it is an id of the Hugging Face Hub.

    Raises:
        ModelError: it is neither.
    """
    name = str(model)
    if not name.strip():
        raise ModelError("the model's name is empty; give a directory or a Hugging Face Hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file; give the directory that holds config.json")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise ModelError(
            f"{name}: there is no such directory; give one that holds config.json and weights, or "
            "an id of the Hugging Face Hub"
        )
    return None


def check_directory(path: Path) -> None:
    """A model's files are there and whole, as far as their headers tell.

    Raises:
        ModelError: the message names the file.
    """
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} holds a LoRA adapter (adapter_config.json), which is not supported; merge it "
            "into its base model with peft's merge_and_unload() and save that"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; save the model with model.save_pretrained")
    for file in _weight_files(path):
        _check_weights(file)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, by the index if there is one."""
    for name in _SINGLES:
        if (path / name).exists():
            return [path / name]
    for name in _INDEXES:
        index = path / name
        if index.exists():
            with explained(f"{index} is not an index of weights"):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [path / shard for shard in shards]
    raise ModelError(
        f"{path} has no weights (model.safetensors or model.safetensors.index.json); save the "
        "model with model.save_pretrained"
    )


def _check_weights(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file} is missing; download or save the model again")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{file} is a git-lfs pointer, not weights; run git lfs pull")
    if file.suffix == ".safetensors":
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged ({one_line(error)}); download or save the model again"
            ) from error


# Configs ------------------------------------------------------------------------------------------


def check_config(config: PreTrainedConfig) -> None:
    """A model of this kind can be served, as far as its config tells.

    Raises:
        ModelError: it cannot; the message says why.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model; vattn serves decoder-only ones")
    decoder = config.get_text_config(decoder=True)
    if decoder.model_type in _OWN_MEMORY:
        raise ModelError(f"{kind} keeps a state of its own kind instead of K and V")
    if _value(decoder, "kv_lora_rank"):
        raise ModelError(
            f"{kind} has multi-head latent attention (kv_lora_rank), which is not supported: its "
            "cache is not K and V of equal heads"
        )
    if shared := _value(decoder, "num_kv_shared_layers"):
        raise ModelError(
            f"{kind} has {shared} layers that share the K and V of others "
            "(num_kv_shared_layers), which is not supported"
        )
    _check_layers(kind, decoder)


def check_generates(config: PreTrainedConfig) -> None:
    """Transformers has a model for this config that generates text.

    Raises:
        ModelError: it has not.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{config.model_type} is not a model that generates text")


def _value(decoder: PreTrainedConfig, name: str) -> Any:
    """A setting, of any layer if layers differ in it; None if there is no such thing."""
    try:
        return getattr(decoder, name, None)
    except (AttributeError, RuntimeError):  # some configs do not answer for all layers at once
        values = (getattr(layer, name, None) for layer in decoder.per_layer_config)
        return next((value for value in values if value), None)


def _check_layers(kind: str, decoder: PreTrainedConfig) -> None:
    try:
        types = layer_types(decoder)
    except AttributeError as error:
        raise ModelError(f"{kind} does not tell its layers: {one_line(error)}") from error
    for index, layer in enumerate(types):
        if layer == "chunked_attention":
            raise ModelError(
                f"layer {index} of {kind} has chunked attention, which is not supported"
            )
        if layer not in _SERVED:
            raise ModelError(
                f"layer {index} of {kind} is of type {layer}; vattn serves layers of attention "
                "over K and V, not state-space, linear, convolutional or compressed ones"
            )


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Most tokens of a sequence; None if the config does not say.

    Long-context rotary embeddings (longrope) of transformers switch factors for the whole batch as
    soon as one of its sequences is long, which changes all others: only the lengths before that are
    served.
    """
    decoder = config.get_text_config(decoder=True)
    limit = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope: Any = getattr(decoder, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope":
            limit = min(limit, each.get("original_max_position_embeddings") or limit)
    return limit


# Models -------------------------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """A model object is whole, in one place, and no adapter.

    Raises:
        ModelError: it is not.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name} has a LoRA adapter loaded, which is not supported; merge it with peft's "
            "merge_and_unload()"
        )
    places = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if "meta" in places:
        raise ModelError(f"{name} has weights that are not in memory; load it without offloading")
    if len(places) > 1:
        raise ModelError(
            f"{name} is spread over {', '.join(places)}; more than one device is not supported: "
            "load it onto one, without device_map"
        )
