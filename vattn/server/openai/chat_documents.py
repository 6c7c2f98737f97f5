"""Responses of chats, as the OpenAPI document describes them; nothing is made of these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from vattn.server.openai.usage import UsageInfo


class FunctionCallInfo(BaseModel):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallInfo(BaseModel):
    """A call that the client is to make."""

    id: str
    type: Literal["function"]
    function: FunctionCallInfo


class ChatMessageInfo(BaseModel):
    """The answer; ``content`` is null if it is calls only."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallInfo] | None = None


class TokenInfo(BaseModel):
    """A token, its log probability, and its text's UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenInfo):
    """The same, and the likeliest at its place."""

    top_logprobs: list[TokenInfo]


class ChatLogprobs(BaseModel):
    """Of all of an answer's tokens, those of calls included."""

    content: list[TokenLogprobs]
    refusal: None


class ChatChoiceInfo(BaseModel):
    """One sample."""

    index: int
    message: ChatMessageInfo
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The body of a response."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoiceInfo]
    usage: UsageInfo
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class FunctionCallDelta(BaseModel):
    """``name`` where a call begins, then parts of ``arguments``."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A call that begins, with ``id`` and ``type``, or that goes on."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(BaseModel):
    """What is new of an answer; the first one has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoiceDelta(BaseModel):
    """One sample; its last delta has the reasons of its end."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoiceDelta]
    usage: UsageInfo | None = None
    prompt_token_ids: list[int] | None = None


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer; with `stream`, events that are each a "
        "`ChatCompletionChunk`, and end with `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
