"""Loads an unmodified transformers model for the engine, or says why it cannot be served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from vattn.attention.base import AttentionSpec
from vattn.hf.attention import register, taken_over
from vattn.hf.checks import (
    ModelError,
    check_config,
    check_directory,
    check_generates,
    check_model,
    explained,
    find_directory,
    longest_sequence,
)
from vattn.hf.probe import observe
from vattn.kv.layout import LayerSpec
from vattn.kv.pool import parse_device

__all__ = ["LoadedModel", "ModelError", "load_model", "load_tokenizer"]

DTYPES = {
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
}
# Settings of a generation config that SamplingParams has, and their names there.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# Those of them that text without chance depends on, too.
_GREEDY = ("repetition_penalty", "max_tokens")
# Settings of a generation config that change its text and that SamplingParams has no name for, and
# the value beside none, 0 and empty that asks for nothing.
_NOT_SERVED = {
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "num_beams": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
}
_NOT_SERVED_SAMPLING = {"typical_p": 1, "top_h": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


@dataclass(frozen=True)
class LoadedModel:
    """A model whose attention is vattn's, and what the engine must know of it.

    Args:
        model: the transformers model, in evaluation mode.
        specs: what each layer with attention computes, in order.
        layer_of: index in ``specs`` of an attention module's ``layer_idx``.
        vocab_size: width of the logits; may exceed the tokenizer's vocabulary.
        keeps_logits: it computes the logits of chosen tokens only, if asked to.
        max_positions: longest sequence in tokens; None if the config does not say.
        eos_token_ids: that end a text.
        generation_defaults: what its generation config asks for, as arguments of SamplingParams.
        generation_ignored: what else it asks for, as ``name=value``, which is not served.
    """

    model: Any
    specs: list[AttentionSpec]
    layer_of: dict[int, int]
    vocab_size: int
    keeps_logits: bool
    max_positions: int | None
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, Any]
    generation_ignored: tuple[str, ...] = ()

    @property
    def config(self) -> PreTrainedConfig:
        """The model's."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def dtype(self) -> torch.dtype:
        """Of its K and V."""
        return self.specs[0].dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.model.device
        return device

    def layer_specs(self) -> list[LayerSpec]:
        """What a KVCache for it stores."""
        return [LayerSpec(s.kv_heads, s.head_dim, s.dtype, s.window) for s in self.specs]


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Loads a decoder-only model for an engine, which owns its attention from then on.

    Args:
        model: a directory, an id of the Hugging Face Hub, or a model object. An object is used as
            it is, not copied: moved, cast, set to evaluation mode, and its attention taken over.
        dtype: ``"auto"`` for the checkpoint's own, one of :data:`DTYPES`, or a torch dtype.
        device: None for the GPU where there is one, or for where a model object is.
        revision: branch, tag or commit of a Hub model.

    Raises:
        ModelError: not there, not whole, or of a kind that cannot be served; the message says what.
            A model object has its attention back.
    """
    kind = _find_dtype(dtype)
    place = _find_device(device)
    if isinstance(model, (str, Path)):
        ready = _read(model, kind, revision)
        ready.to(place or _default_device())
    else:
        ready = _given(model, revision)
        ready.to(device=place, dtype=kind)
    return _finish(ready.eval())


def _given(model: Any, revision: str | None) -> Any:
    """A model object, if it can be served as far as it tells itself."""
    if isinstance(model, torch.nn.Module):
        check_model(model)  # adapters come as modules of another class
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no model; give a directory, a Hub id or a PreTrainedModel"
        )
    if revision is not None:
        raise ModelError(f"revision={revision!r} is of a Hub model; this one is loaded already")
    check_config(model.config)
    return model


def _read(model: str | Path, dtype: torch.dtype | None, revision: str | None) -> Any:
    """The model in host memory."""
    directory = find_directory(model)
    if directory is not None:
        if revision is not None:
            raise ModelError(f"revision={revision!r} is of a Hub model, and {model} is a directory")
        check_directory(directory)
    source, what = str(directory or model), "cannot be read"
    if directory is None:
        what = "is no directory here and cannot be had from the Hugging Face Hub"
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with explained(f"{model}: its configuration {what}"):
        config = AutoConfig.from_pretrained(source, **options)
    check_config(config)
    check_generates(config)
    with explained(f"{model}: its weights cannot be read"):
        auto: Any = AutoModelForCausalLM
        loaded, report = auto.from_pretrained(
            source, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{model}: its weights lack {len(missing)} tensors of its configuration, "
            f"{missing[0]} among them; download or save the model again"
        )
    check_model(loaded)
    return loaded


def _finish(model: Any) -> LoadedModel:
    limit = longest_sequence(model.config)
    register()
    with taken_over(model):
        seen = observe(model, limit)
    generation = model.generation_config
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return LoadedModel(
        model=model,
        specs=seen.specs,
        layer_of=seen.layer_of,
        vocab_size=seen.vocab_size,
        keeps_logits=seen.keeps_logits,
        max_positions=limit,
        eos_token_ids=frozenset([ends] if isinstance(ends, int) else ends or ()),
        generation_defaults=_sampling_defaults(generation),
        generation_ignored=_not_served(generation),
    )


def _sampling_defaults(generation: Any) -> dict[str, Any]:
    """What a generation config asks for, where it asks: greedy only if it says so."""
    if generation is None:
        return {}
    found = {ours: getattr(generation, theirs, None) for theirs, ours in _SAMPLING.items()}
    found = {name: value for name, value in found.items() if value is not None}
    if getattr(generation, "do_sample", None) is False:
        found = {name: value for name, value in found.items() if name in _GREEDY}
        found["temperature"] = 0.0
    return found


def _not_served(generation: Any) -> tuple[str, ...]:
    """What a generation config asks for in vain. Greedy text has no use for how to sample."""
    settings = dict(_NOT_SERVED)
    if getattr(generation, "do_sample", None) is not False:
        settings |= _NOT_SERVED_SAMPLING
    asked = {name: getattr(generation, name, None) for name in settings}
    return tuple(
        f"{name}={value!r}" for name, value in asked.items() if value and value != settings[name]
    )


def _find_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return found


def _find_device(device: str | torch.device | None) -> torch.device | None:
    return None if device is None else parse_device(device)


def _default_device() -> torch.device:
    return parse_device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(model: Any, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, with its chat template.

    Args:
        model: a directory, a Hub id, a model object that was loaded from one, or a tokenizer
            object, which is returned as it is.
        revision: of a Hub model.

    Raises:
        ModelError: there is none that can be read.
    """
    if isinstance(model, PreTrainedModel):
        name = getattr(model.config, "_name_or_path", "")
        if not name:
            raise ModelError(
                f"this {type(model).__name__} was not loaded from anywhere that could have a "
                "tokenizer; give tokenizer=..., or skip_tokenizer_init=True and token ids"
            )
        model = name
    if not isinstance(model, (str, Path)):
        if not hasattr(model, "encode") or not hasattr(model, "decode"):
            raise ModelError(f"{type(model).__name__} is no tokenizer")
        return model
    directory = find_directory(model)
    with explained(f"{model}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(
            str(directory or model), revision=revision, trust_remote_code=False
        )
