"""What a body asks of the engine: SamplingParams, the prompt's tokens, room for new ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vattn.async_llm import AsyncLLM
from vattn.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vattn.server.errors import ApiError
from vattn.server.openai.common import (
    JsonObjectFormat,
    JsonSchemaFormat,
    SamplingFields,
    StructuralTagFormat,
)
from vattn.server.state import ServerState
from vattn.server.tools.strict import WHITESPACE
from vattn.texts import LONG_CHARS, beside

_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAME_NAME = (
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "logit_bias",
    "allowed_token_ids",
)
# By the type of a response format: the field whose schemas are compiled.
FORMAT_PARAMS = {
    "json_schema": "response_format.json_schema.schema",
    "structural_tag": "response_format.structures",
}
_SEEDS = (1 << 63) - 1


def make_params(
    state: ServerState,
    body: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structured_outputs: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """How the engine is to sample; a stream gets deltas, everybody else one output at the end.

    Args:
        state: the model's own defaults, and how many log probabilities may be asked for.
        body: what the client asks for. Of a negative seed, one of OpenAI's 64-bit integers, the
            lower 63 bits are taken.
        max_tokens: from :func:`room_for`.
        logprobs: likeliest tokens at each position, None for no log probabilities.
        prompt_logprobs: the same of the prompt.
        structured_outputs: instead of the body's, for tool calls.

    Raises:
        ApiError: 400, with the field that is at fault.
    """
    for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        check_logprobs(state, name, count)
    vocab_size = state.llm.facts.vocab_size
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        tokens = getattr(body, name) or ()
        if len(tokens) > vocab_size:
            message = f"{name} has {len(tokens)} token ids, and the model has {vocab_size}"
            raise ApiError(400, message, param=name)
    defaults = state.llm.facts.generation_defaults
    given: dict[str, Any] = {name: defaults[name] for name in _FROM_MODEL if name in defaults}
    for name in (*_FROM_MODEL, *_SAME_NAME):
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    if body.seed is not None:
        given["seed"] = body.seed & _SEEDS
    try:
        structured = structured_outputs or structured_of(body)
        return SamplingParams(
            n=body.samples,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            output_kind=(RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY),
            structured_outputs=structured,
            **given,
        )
    except ValueError as error:
        raise refusal(error, body) from error


def check_logprobs(state: ServerState, name: str, count: int | None) -> None:
    """Refuses a field that asks for more log probabilities than ``max_logprobs``; -1 is all."""
    most = state.settings.max_logprobs
    if count is not None and (count < 0 or 0 <= most < count):
        limit = f" and at most {most}" if most >= 0 else ""
        raise ApiError(400, f"{name}={count} must be at least 0{limit}", param=name)


def structured_of(body: SamplingFields) -> StructuredOutputsParams | None:
    """The language that ``structured_outputs`` or ``response_format`` asks for.

    Raises:
        ApiError: 400; none or several of them.
    """
    asked = body.structured_outputs
    if asked is not None:
        try:
            return StructuredOutputsParams(
                json=asked.json_,
                regex=asked.regex,
                choice=asked.choice,
                grammar=asked.grammar,
                json_object=bool(asked.json_object),
                structural_tag=asked.structural_tag,
                disable_any_whitespace=bool(asked.disable_any_whitespace),
                whitespace_pattern=asked.whitespace_pattern,
            )
        except ValueError as error:
            raise ApiError(400, str(error), param="structured_outputs") from error
    if isinstance(body.response_format, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True, whitespace_pattern=WHITESPACE)
    if isinstance(body.response_format, JsonSchemaFormat):
        schema = body.response_format.json_schema.json_schema
        schema = {} if schema is None else schema
        return StructuredOutputsParams(json=schema, whitespace_pattern=WHITESPACE)
    if isinstance(body.response_format, StructuralTagFormat):
        tag = body.response_format.model_dump(by_alias=True)
        try:
            return StructuredOutputsParams(structural_tag=tag, whitespace_pattern=WHITESPACE)
        except ValueError as error:
            raise ApiError(400, str(error), param="response_format") from error
    return None


def refusal(error: Exception, body: SamplingFields | None = None) -> ApiError:
    """What the engine or SamplingParams said of bad input: 400, with the field if it is named."""
    text = str(error)
    named = re.match(r"(?:all of )?(\w+)", text)
    fields = () if body is None else type(body).model_fields
    param = named[1] if named and named[1] in fields else None
    if param is None and text.startswith(("token id ", "the prompt ")):
        param = "prompt" if "prompt" in fields else "messages"
    return ApiError(400, text, param=param)


async def encode(llm: AsyncLLM, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text; other requests go on while a long one is looked at."""
    return (await encode_all(llm, [text], add_special_tokens=add_special_tokens))[0]


async def encode_all(
    llm: AsyncLLM, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """The same of several texts."""

    def tokens() -> list[list[int]]:
        return [
            llm.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            for text in texts
        ]

    return await beside(sum(map(len, texts)), tokens)


def check_length(state: ServerState, chars: int, *, param: str) -> None:
    """Refuses a text that cannot fit, however it is tokenized: before it is, for that takes long.

    Args:
        state: has the tokenizer and ``max_model_len``.
        chars: of the text.
        param: the prompt's field, for the error.

    Raises:
        ApiError: 400 ``context_length_exceeded``.
    """
    if chars <= LONG_CHARS:
        return
    longest = state.llm.facts.max_model_len
    if chars > longest * state.longest_token:
        raise ApiError(
            400,
            f"this model's maximum context length is {longest} tokens, and the prompt's {chars} "
            "characters are more than so many tokens can have; shorten the prompt, or set "
            "truncate_prompt_tokens",
            param=param,
            code="context_length_exceeded",
        )


def room_for(
    state: ServerState,
    prompt_tokens: int,
    max_tokens: int | None,
    *,
    param: str,
    limit: str = "max_tokens",
) -> int:
    """How many new tokens there may be: ``max_tokens``, or all that the model's length allows.

    Args:
        state: has ``max_model_len``.
        prompt_tokens: of the prompt, after truncation.
        max_tokens: as the client gave it; None for the rest of the model's length.
        param: the prompt's field, for the error.
        limit: the field of ``max_tokens``, for the error if the prompt alone would fit.

    Raises:
        ApiError: 400 ``context_length_exceeded``; the prompt leaves less room than that.
    """
    longest = state.llm.facts.max_model_len
    asked = 1 if max_tokens is None else max_tokens
    if prompt_tokens < longest < prompt_tokens + asked:
        param = limit
    if prompt_tokens + asked > longest:
        raise ApiError(
            400,
            f"this model's maximum context length is {longest} tokens, and the request needs "
            f"{prompt_tokens + asked}: {prompt_tokens} of the prompt and {asked} new ones; shorten "
            "the prompt, lower max_tokens, or set truncate_prompt_tokens",
            param=param,
            code="context_length_exceeded",
        )
    return longest - prompt_tokens if max_tokens is None else max_tokens


def truncated(
    state: ServerState, ids: list[int], keep: int | None, max_tokens: int | None
) -> list[int]:
    """The last ``keep`` tokens of a prompt; None for all, -1 for as many as leave room.

    Raises:
        ApiError: 400; nothing would be left.
    """
    if keep is None:
        return ids
    if keep == 0:
        raise ApiError(
            400,
            "truncate_prompt_tokens=0 leaves no prompt; keep one token or more",
            param="truncate_prompt_tokens",
        )
    if keep < 0:
        keep = max(1, state.llm.facts.max_model_len - (max_tokens or 1))
    return ids[-keep:]
