"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, FailFast, Field, model_validator

from vattn.server.errors import ApiError
from vattn.server.openai.chat_messages import MOST_MESSAGES, MessageField
from vattn.server.openai.chat_template import chat_prompt
from vattn.server.openai.common import Body, check_model, refused
from vattn.server.openai.off import Off
from vattn.server.openai.sampling import encode
from vattn.server.openai.sse import encode_json
from vattn.server.openai.tool_choice import ToolsField
from vattn.server.state import ServerState, state_of

router = APIRouter()

# Even in a thread to decode two million takes a second of the interpreter's lock.
_MOST = 65_536
_MANY = 4096  # tokens; more are looked at in a thread, so that others' streams go on meanwhile


class TokenizeBody(Body):
    """A text, or the messages of a chat, which the chat template makes a text of."""

    OFF: ClassVar[Off] = {"chat_template": (), "mm_processor_kwargs": ({},)}

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageField] | None = Field(
        None, min_length=1, max_length=MOST_MESSAGES, fail_fast=True
    )
    add_special_tokens: bool | None = Field(None, description="True for a prompt, else false.")
    return_token_strs: bool | None = None
    tools: ToolsField | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "give prompt or messages, one of them")
        for name in (
            "tools",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template_kwargs",
        ):
            if self.messages is None and getattr(self, name) is not None:
                raise refused(name, f"{name} needs messages; leave it out")
        return self


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


class Tokenized(BaseModel):
    """Token ids, and the tokens as the tokenizer writes them if ``return_token_strs``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text."""

    prompt: str


@router.post("/tokenize", response_model=None, responses={200: {"model": Tokenized}})
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The token ids that a prompt becomes."""
    state = state_of(request)
    check_model(state, body.model)
    ids = await _ids(state, body)

    def told() -> bytes:
        names = None
        if body.return_token_strs:
            names = [str(name) for name in state.llm.tokenizer.convert_ids_to_tokens(ids)]
        most = state.llm.facts.max_model_len
        whole = {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": names}
        return encode_json(whole)

    content = told() if len(ids) <= _MANY else await asyncio.to_thread(told)
    return Response(content, media_type="application/json")


async def _ids(state: ServerState, body: TokenizeBody) -> list[int]:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return await encode(state.llm, body.prompt, add_special_tokens=special)
    return await chat_prompt(
        state,
        body.messages or [],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        chat_template_kwargs=body.chat_template_kwargs,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """The text that token ids are."""
    state = state_of(request)
    check_model(state, body.model)
    most = max(_MOST, state.llm.facts.max_model_len)
    if len(body.tokens) > most:
        message = f"{len(body.tokens)} tokens in one request, and {most} may be; send them in parts"
        raise ApiError(400, message, param="tokens")
    if len(body.tokens) <= _MANY:
        return Detokenized(prompt=_text(state, body.tokens))
    return Detokenized(prompt=await asyncio.to_thread(_text, state, body.tokens))


def _text(state: ServerState, tokens: list[int]) -> str:
    known = len(state.llm.tokenizer)
    bad = next((token for token in tokens if not 0 <= token < known), None)
    if bad is not None:
        raise ApiError(
            400, f"token id {bad} is not one of the {known} of the tokenizer", param="tokens"
        )
    text: str = state.llm.tokenizer.decode(tokens)
    return text
