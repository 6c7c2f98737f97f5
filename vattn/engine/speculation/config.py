"""The setting ``speculative_config``, checked where it enters; no torch here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vattn.config import positive_int

METHODS = ("ngram", "draft_model")
# Most drafts of a request in one step: beyond it a step costs more than drafts can save.
MAX_SPECULATIVE_TOKENS = 128
# Most tokens of the n-grams that are looked up; each size costs time and memory per token.
MAX_LOOKUP_TOKENS = 32
_DEFAULT_LOOKUP_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How drafts are made. Names, meanings and defaults are vLLM's.

    Args:
        method: ``"ngram"`` looks for earlier occurrences of the last tokens of a request in its own
            text and proposes what followed; ``"draft_model"`` asks a small model. None for the
            latter if ``model`` is given.
        num_speculative_tokens: most drafts of a request in one step.
        model: of ``"draft_model"``: a directory, an id of the Hugging Face Hub or a loaded
            ``PreTrainedModel``, with the same vocabulary as the model that it drafts for.
        prompt_lookup_max: of ``"ngram"``: how many last tokens are looked for at most.
        prompt_lookup_min: and at least. If one of the two is given, the other is the same; if none
            is, both are 5.

    Raises:
        ValueError: a value of another type, out of range or of the other method; the message names
            it and what it may be.
    """

    num_speculative_tokens: int
    method: str | None = None
    model: Any = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        name = "speculative_config's num_speculative_tokens"
        count = positive_int(self.num_speculative_tokens, name)
        if count > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"{name}={count} must be at most {MAX_SPECULATIVE_TOKENS}")
        self._set("num_speculative_tokens", count)
        if self.method is None and self.model is not None:
            self._set("method", "draft_model")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(
                f"speculative_config's method={self.method!r} must be one of {', '.join(METHODS)}; "
                "others are not supported"
            )
        if self.method == "ngram":
            self._check_lookup()
        else:
            self._check_model()

    def _check_lookup(self) -> None:
        if self.model is not None:
            raise ValueError(
                f"speculative_config's model={_named(self.model)} is of the method draft_model; "
                "ngram drafts from a request's own text: drop one of them"
            )
        most = self._lookup("prompt_lookup_max", self.prompt_lookup_min)
        least = self._lookup("prompt_lookup_min", most)
        if least > most:
            raise ValueError(
                f"speculative_config's prompt_lookup_min={least} is more than "
                f"prompt_lookup_max={most}; lower it"
            )
        self._set("prompt_lookup_max", most)
        self._set("prompt_lookup_min", least)

    def _lookup(self, name: str, other: int | None) -> int:
        value = getattr(self, name)
        if value is None:
            value = other if other is not None else _DEFAULT_LOOKUP_TOKENS
        value = positive_int(value, f"speculative_config's {name}")
        if value > MAX_LOOKUP_TOKENS:
            raise ValueError(
                f"speculative_config's {name}={value} must be at most {MAX_LOOKUP_TOKENS}"
            )
        return value

    def _check_model(self) -> None:
        if self.model is None:
            raise ValueError(
                "speculative_config's method draft_model needs a model: a directory, an id of the "
                "Hugging Face Hub or a PreTrainedModel"
            )
        # A model object is a mapping's or text's equal in nothing; the loader looks at it.
        if isinstance(self.model, str | Path) and not str(self.model):
            raise ValueError("speculative_config's model is empty; give a directory or a Hub id")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"speculative_config's {name}={getattr(self, name)!r} is of the method ngram; "
                    "drop it, or the model"
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def parse_speculative(given: Any) -> SpeculativeConfig | None:
    """A setting as users write it, checked.

    Args:
        given: a mapping of the fields of :class:`SpeculativeConfig`, one of these, or None.

    Raises:
        ValueError: something else, a name that does not exist, or a bad value.
    """
    if given is None or isinstance(given, SpeculativeConfig):
        return given
    example = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}'
    if not isinstance(given, Mapping):
        raise ValueError(f"speculative_config={given!r} must be a mapping such as {example}")
    known = [field.name for field in fields(SpeculativeConfig)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it may have {', '.join(known)}"
            raise ValueError(f"speculative_config has no {name!r}; {hint}")
    if "num_speculative_tokens" not in given:
        raise ValueError(f"speculative_config needs num_speculative_tokens, as in {example}")
    return SpeculativeConfig(**given)


def _named(model: object) -> str:
    """A model as a message can show it."""
    return repr(model) if isinstance(model, str | Path) else type(model).__name__
