"""Finds what ``vattn generate`` is to load; all that can be wrong with it is told in one line.

The checks are those of :mod:`vattn.hf.checks`, which the engine makes, too: here they come before
anything large is read, and name the option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig
from transformers.utils import logging

from vattn.cli.console import BadInput, one_line
from vattn.hf import checks
from vattn.hf import model as hf_model
from vattn.models import tiny_path

EMBEDDED = "embedded"
DTYPES = ("auto", *hf_model.DTYPES)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "merges.txt")
_INSTEAD = "give a decoder-only model with attention layers, such as Llama, Qwen or Gemma"


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
        BadInput: no such directory, or one without a file that every model has.
    """
    if model is None:
        path = tiny_path()
        if not (path / "config.json").is_file():
            raise BadInput(f"the embedded model is missing from {path}; give --model DIR")
        return Source(EMBEDDED, str(path), is_directory=True, is_embedded=True)
    if not model.strip():
        raise BadInput("--model is empty; give a directory or a model id of the Hugging Face Hub")
    source = Source(model, model, is_directory=False, is_embedded=False)
    with told(source):
        directory = checks.find_directory(model)
        if directory is None:
            return source
        checks.check_directory(directory)
    if not any(any(directory.glob(name)) for name in _TOKENIZERS):
        raise BadInput(
            f"--model {directory} has no tokenizer (tokenizer.json); save it there with "
            "tokenizer.save_pretrained"
        )
    name = directory.resolve().name
    return Source(name, str(directory), is_directory=True, is_embedded=False)


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


def check_dtype(dtype: str) -> None:
    """A dtype of weights, or the model's own.

    Raises:
        BadInput: it is neither.
    """
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")


def load_config(source: Source) -> Any:
    """The model's configuration.

    Raises:
        BadInput: unreadable, or of a model that the engine cannot serve.
    """
    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # whatever it is, this model cannot be used
        raise BadInput(_unreadable(source, error)) from error
    try:
        checks.check_config(config)
    except checks.ModelError as error:
        raise BadInput(f"--model {source.name}: {error}; {_INSTEAD}") from error
    return config


def _unreadable(source: Source, error: Exception) -> str:
    if source.is_directory:
        return f"--model {source.location}: cannot read its configuration: {one_line(error)}"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        remedy = (
            "HF_HUB_OFFLINE is set and it is not in the local cache; unset it, or give a directory"
        )
    else:
        remedy = (
            f"{one_line(error, 160)}; check the id, the network and your token, or give a directory"
        )
    return (
        f"--model {source.name} is no directory here, and its configuration cannot be had from the "
        f"Hugging Face Hub: {remedy}"
    )


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        BadInput: there is none that can be read.
    """
    with told(source):
        return hf_model.load_tokenizer(source.location)


@contextmanager
def told(source: Source) -> Iterator[None]:
    """Tells a ModelError as bad input of ``--model``."""
    try:
        yield
    except checks.ModelError as error:
        text = one_line(error)
        if text.startswith("speculative_config"):  # of the model that drafts
            raise BadInput(text.replace("speculative_config", "--speculative-config", 1)) from error
        if not text.startswith(source.location):
            text = f"{source.name}: {text}"
        raise BadInput(f"--model {text}") from error
