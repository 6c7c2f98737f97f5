"""The model that ships with vattn: a Llama small enough for a wheel, in transformers format."""

from importlib.resources import files
from pathlib import Path

__all__ = ["tiny_path"]


def tiny_path() -> Path:
    """The directory of the packaged model, ready for `from_pretrained`.

    It holds a `LlamaForCausalLM` of 1.97 million parameters and its tokenizer; they write English
    technical prose and need no network. Its README.md is the model card.
    """
    return Path(str(files(__name__) / "tiny"))
