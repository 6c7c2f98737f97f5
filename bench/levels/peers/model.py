"""The model that all peers run, as an object and as a directory that engines can open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def save_model(model: Any, directory: Path) -> None:
    """Weights and configuration, and a tokenizer, since some engines open one unasked.

    Its words are the numbers of the tokens; requests are token ids and never pass through it.
    """
    model.save_pretrained(directory)
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)


def weight_bytes(model: Any) -> int:
    """Of all parameters; tied ones count once."""
    return sum(
        p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values()
    )
