"""Prompts in every form that people give them in, as token ids."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt", "priority"}


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt, or many, as a list of prompts.

    Raises:
        ValueError: neither.
    """
    if isinstance(prompts, (str, bytes, bytearray, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts={reprlib.repr(prompts)} must be a prompt, or many in a list")
    many = list(prompts)
    if getattr(prompts, "ndim", 0) == 1 and not any(
        isinstance(item, (str, Mapping)) for item in many
    ):
        return [prompts]  # an array or a tensor of token ids
    if many and all(map(_is_integer, many)):
        return [many]
    return many


def parse_prompt(
    prompt: Any, priority: Any, encode: Callable[[str], Any]
) -> tuple[str | None, list[int], str, int]:
    """Text, token ids, salt and priority of a prompt.

    Args:
        prompt: in any of the forms.
        priority: of a prompt that does not give its own.
        encode: text to token ids.

    Raises:
        ValueError: it is not one.
        Exception: whatever the tokenizer raises.
    """
    salt = ""
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in prompt.items() if value is not None}
        if unknown := set(prompt) - _PROMPT_KEYS:
            raise ValueError(
                f"a prompt has no {sorted(map(str, unknown))}; use {sorted(_PROMPT_KEYS)}"
            )
        if ("prompt" in given) == ("prompt_token_ids" in given):
            raise ValueError("a prompt needs one of prompt and prompt_token_ids")
        salt, priority = given.get("cache_salt", ""), given.get("priority", priority)
        if not isinstance(salt, str):
            raise ValueError(f"cache_salt={salt!r} must be a string")
        prompt = given["prompt"] if "prompt" in given else given["prompt_token_ids"]
        _check_key("prompt" in given, prompt)
    if not _is_integer(priority):
        raise ValueError(f"priority={reprlib.repr(priority)} must be a whole number")
    priority = operator.index(priority)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        ids = encode(prompt)
        return prompt, _token_ids(ids), salt, priority
    return None, _token_ids(prompt), salt, priority


def one_each(values: Any, n: int, name: str) -> list[Any]:
    """A value for each of ``n`` prompts, of one for all or of one for each.

    Raises:
        ValueError: another number of them.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return [values] * n
    each = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(each) != n:
        raise ValueError(f"{len(each)} {name} for {n} prompts; give one for each, or one")
    return each


def check_timeout(timeout_s: Any) -> None:
    """Refuses what is no time.

    Raises:
        ValueError: not None, and not a finite positive number.
    """
    if timeout_s is None:
        return
    number = isinstance(timeout_s, numbers.Real) and not isinstance(timeout_s, bool)
    if not number or not math.isfinite(timeout_s) or timeout_s <= 0:
        raise ValueError(
            f"timeout_s={timeout_s!r} must be a finite number of seconds above 0, or None for no "
            "limit"
        )


def _is_integer(value: Any) -> bool:
    """Whether it is one number; arrays and tensors with one element say that they are, too."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _token_ids(given: Any) -> list[int]:
    """Token ids in any form as plain integers.

    Raises:
        ValueError: they are not token ids.
    """
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(
            f"{reprlib.repr(given)} is no prompt; give text, token ids or a dictionary"
        )
    if getattr(given, "ndim", 1) != 1:
        raise ValueError(
            f"a prompt of shape {tuple(getattr(given, 'shape', ()))} has not one dimension; give "
            "one row of token ids for each prompt"
        )
    ids = given.tolist() if hasattr(given, "tolist") else list(given)
    if set(map(type, ids)) <= {int}:
        return ids
    for token in ids:
        if not _is_integer(token):
            raise ValueError(f"{reprlib.repr(token)} is no token id; give whole numbers")
    return [operator.index(token) for token in ids]


def _check_key(is_text: bool, prompt: Any) -> None:
    if is_text and not isinstance(prompt, str):
        raise ValueError(
            f"prompt={reprlib.repr(prompt)} is no text; give token ids as prompt_token_ids"
        )
    if not is_text and isinstance(prompt, str):
        raise ValueError(f"prompt_token_ids={reprlib.repr(prompt)} is text; give it as prompt")
