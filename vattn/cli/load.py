"""Finds and loads a transformers model; all that can be wrong with one is told in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from vattn.cli.console import BadInput, CliError, one_line
from vattn.models import tiny_path

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "merges.txt")
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a directory, or an id on the Hugging Face Hub."""

    name: str
    location: str
    is_directory: bool
    is_embedded: bool


def quiet_transformers() -> None:
    """Only errors: stderr belongs to the command."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def find_model(model: str | None) -> Source:
    """The model that ``--model`` names, the embedded one for None.

    Raises:
        BadInput: no such directory, or one that lacks a file every model has.
    """
    if model is None:
        path = tiny_path()
        if not (path / "config.json").is_file():
            raise BadInput(f"the embedded model is missing from {path}; give --model DIR")
        return Source(EMBEDDED, str(path), is_directory=True, is_embedded=True)
    if not model.strip():
        raise BadInput("--model is empty; give a directory or a model id of the Hugging Face Hub")
    path = Path(model).expanduser()
    if path.is_dir():
        _check_directory(path)
        return Source(path.resolve().name, str(path), is_directory=True, is_embedded=False)
    if path.exists():
        raise BadInput(f"--model {model} is a file; give the directory that holds config.json")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "~")):
        raise BadInput(
            f"--model {model}: there is no such directory; give one that holds config.json, "
            "weights and a tokenizer, or a model id of the Hugging Face Hub"
        )
    return Source(model, model, is_directory=False, is_embedded=False)


def _check_directory(path: Path) -> None:
    for what, names in (
        ("config.json", ("config.json",)),
        ("weights (*.safetensors)", _WEIGHTS),
        ("tokenizer (tokenizer.json)", _TOKENIZERS),
    ):
        if not any(any(path.glob(name)) for name in names):
            raise BadInput(
                f"--model {path} has no {what}; save it there with model.save_pretrained and "
                "tokenizer.save_pretrained"
            )


def find_device(device: str | None) -> torch.device:
    """The device asked for; by default the GPU where there is one.

    Raises:
        BadInput: not cpu or cuda[:n], or a GPU that PyTorch does not see.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BadInput(f"--device {device} is not a device that vattn runs on; use cpu or cuda[:n]")
    found = torch.device(device)
    if found.type == "cuda":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus == 0:
            raise BadInput(
                f"--device {device}: PyTorch {torch.__version__} sees no GPU here; "
                "use --device cpu, or see what is missing with: vattn doctor"
            )
        if (found.index or 0) >= gpus:
            raise BadInput(f"--device {device}: there are {gpus} GPUs here, cuda:0 is the first")
    return found


def find_dtype(dtype: str) -> torch.dtype | None:
    """The dtype asked for, None for the model's own.

    Raises:
        BadInput: a name that is not a dtype of weights.
    """
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_config(source: Source) -> Any:
    """The model's configuration.

    Raises:
        BadInput: unreadable, or of a model that no KV cache can serve.
    """
    with _explained(source, "configuration"):
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise BadInput(
            f"--model {source.name} is an encoder-decoder model ({config.model_type}); vattn runs "
            "decoder-only language models, such as Llama, Qwen or Gemma"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadInput(
            f"--model {source.name} ({config.model_type}) does not generate text; give a "
            "decoder-only language model, such as Llama, Qwen or Gemma"
        )
    return config


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer, set to pad on the left.

    Raises:
        BadInput: there is none that can be read.
    """
    with _explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, padding_side="left", trust_remote_code=False
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(source: Source, config: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """The model with its weights, on the device and in evaluation mode.

    Raises:
        BadInput: weights that cannot be read or do not fit the configuration.
    """
    with _explained(source, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=False,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise BadInput(
            f"--model {source.name}: the weights lack {len(missing)} tensors of the configuration "
            f"({', '.join(missing[:2])}, ...); save the model again"
        )
    return model.to(device).eval()


def model_limit(config: Any) -> int | None:
    """The most tokens, prompt and text together, that a model is made for."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def _explained(source: Source, part: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, CliError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever it is, this model cannot be used
        if source.is_directory:
            raise BadInput(
                f"--model {source.location}: cannot read its {part}: {one_line(error)}"
            ) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        remedy = (
            "HF_HUB_OFFLINE is set and it is not in the local cache; unset it, or give a directory"
            if offline
            else f"{one_line(error, 160)}; check the id, the network and your token, or give a "
            "directory"
        )
        raise BadInput(
            f"--model {source.name} is no directory here, and its {part} cannot be had from the "
            f"Hugging Face Hub: {remedy}"
        ) from error
