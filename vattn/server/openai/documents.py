"""Responses of completions, as the OpenAPI document describes them; nothing is made of these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from vattn.server.openai.usage import UsageInfo


class Logprobs(BaseModel):
    """Log probabilities of a choice's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample of one prompt: ``index`` is the prompt's number times ``n``, plus the sample's."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """The body of a response, and of each event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | None = None


# Errors are described for all routes in one place, vattn.server.openapi.
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": "The completion; with `stream`, events that end with `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
