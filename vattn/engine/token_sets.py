"""The sets of tokens that parameters name: whether they exist, and whether they leave anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vattn.sampling_params import SamplingParams

Words = tuple[tuple[int, ...], ...]


def bad_words_ids(words: Sequence[str], tokenizer: Any, vocab_size: int) -> Words:
    """The tokens of words that are not to be generated, each word with and without a space before.

    Args:
        words: of ``bad_words``.
        tokenizer: None if there is none.
        vocab_size: of the model.

    Raises:
        ValueError: there is no tokenizer, or it has no tokens of this model for a word.
    """
    if not words:
        return ()
    if tokenizer is None:
        raise ValueError(
            f"bad_words={list(words)!r} need a tokenizer; use logit_bias, or allowed_token_ids"
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        for text in (bare, " " + bare) if bare else (word,):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not ids or not all(0 <= token < vocab_size for token in ids):
                raise ValueError(
                    f"bad_words has {word!r}, which is {list(ids)} in tokens: none, or some that "
                    f"are not among the {vocab_size} of this model; leave it out"
                )
            found[ids] = None
    return tuple(found)


def check_token_sets(
    params: SamplingParams, stop_ids: frozenset[int], bad_words: Words, vocab_size: int
) -> None:
    """That all tokens named are the model's, and that one can be generated at the beginning.

    Args:
        params: of a request.
        stop_ids: what would end it, end-of-sequence tokens included.
        bad_words: as tokens.
        vocab_size: of the model.

    Raises:
        ValueError: the message names the parameters at odds and what to change.
    """
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        _check_exist(name, getattr(params, name) or (), vocab_size)
    ends = stop_ids if params.min_tokens else frozenset()
    never = {word[0] for word in bad_words if len(word) == 1}
    if params.allowed_token_ids is None:
        if len({token for token in never | ends if token < vocab_size}) == vocab_size:
            raise ValueError(
                f"bad_words and min_tokens={params.min_tokens} rule out all {vocab_size} tokens at "
                "first; leave some words out"
            )
        return
    allowed = frozenset(params.allowed_token_ids)
    if allowed - never - ends:
        return
    words = f"bad_words={list(params.bad_words or ())!r}"
    least = f"min_tokens={params.min_tokens}"
    if allowed <= never:
        why = f"{words} rule out every one of"
    elif allowed <= ends:
        why = f"{least} rules out, at first, end-of-sequence and stop tokens, and so are all of"
    else:
        why = f"{words} and, at first, {least} together rule out every one of"
    raise ValueError(f"{why} allowed_token_ids={_shown(params.allowed_token_ids)}; allow another")


def _check_exist(name: str, ids: Iterable[int], vocab_size: int) -> None:
    unknown = sorted(token for token in ids if token >= vocab_size)
    if unknown:
        raise ValueError(
            f"{name} has {_shown(unknown)}, not among the {vocab_size} tokens of this model "
            f"(0 to {vocab_size - 1})"
        )


def _shown(ids: Sequence[int]) -> str:
    """A list that may be long, as text."""
    some = ", ".join(str(token) for token in ids[:10])
    return f"[{some}, and {len(ids) - 10} more]" if len(ids) > 10 else f"[{some}]"
