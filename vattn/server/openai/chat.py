"""``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from vattn.server.errors import ApiError
from vattn.server.openai.chat_choices import ChatChoice
from vattn.server.openai.chat_documents import RESPONSES
from vattn.server.openai.chat_messages import MOST_MESSAGES, MessageField, text_of
from vattn.server.openai.chat_template import chat_prompt
from vattn.server.openai.common import (
    INT64,
    SamplingFields,
    check_model,
    note_end,
    refused,
    request_id_of,
)
from vattn.server.openai.logprobs import ChatLogprobs, prompt_logprobs_body
from vattn.server.openai.off import COMMON_OFF, Off
from vattn.server.openai.respond import respond
from vattn.server.openai.run import Job, run
from vattn.server.openai.sampling import (
    check_length,
    check_logprobs,
    make_params,
    room_for,
    truncated,
)
from vattn.server.openai.sse import HOLE, TextChunks, encode_json, event, only_text
from vattn.server.openai.token_bytes import TokenBytes
from vattn.server.openai.tool_choice import (
    ToolChoice,
    ToolPlan,
    ToolsField,
    check_format,
    plan_tools,
)
from vattn.server.openai.usage import Usage
from vattn.server.state import ServerState
from vattn.version import __version__

router = APIRouter()

FINGERPRINT = f"vattn-{__version__}"

_OFF: Off = {
    **COMMON_OFF,
    "audio": (),
    "chat_template": (),
    "chat_template_content_format": ("auto", "string"),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True, False),  # there is none
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class ChatCompletionRequest(SamplingFields):
    """What ``/v1/chat/completions`` takes; null is as left out."""

    OFF: ClassVar[Off] = _OFF

    messages: list[MessageField] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(
        None, ge=1, lt=INT64, description="All that there is room for if left out."
    )
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64, description="As `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, lt=INT64)
    tools: ToolsField | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = Field(None, description="Begin with the message that is continued.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fit(self) -> ChatCompletionRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refused(
                "max_tokens", "max_tokens and max_completion_tokens differ; give one of them"
            )
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs needs logprobs=true")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise refused(
                "continue_final_message",
                "continue_final_message=true needs add_generation_prompt=false",
            )
        if self.parallel_tool_calls is False and not self.tools:
            raise refused("parallel_tool_calls", "parallel_tool_calls=false needs tools")
        if self.echo and not self.continue_final_message:
            raise refused("echo", "echo needs continue_final_message=true")
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens, if the client said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """Its field."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def parallel(self) -> bool:
        """Whether several calls may be told."""
        return self.parallel_tool_calls is not False


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A request that has been understood.

    Args:
        head: fields that all its responses have, but ``object``.
        body: what was asked for.
        request: for its line in the log.
        job: for the engine.
        plan: of its tool calls.
        logprobs: tells the log probabilities; None for none.
        echo: text to begin with.
    """

    head: dict[str, Any]
    body: ChatCompletionRequest
    request: Request
    job: Job
    plan: ToolPlan
    logprobs: ChatLogprobs | None
    echo: str

    def choices(self) -> list[ChatChoice]:
        """Fresh ones, of all samples."""
        body = self.body
        return [
            ChatChoice(
                index,
                parser=self.plan.make_parser() if self.plan.make_parser else None,
                parallel=body.parallel,
                echo=self.echo,
                logprobs=self.logprobs,
                token_ids=bool(body.return_token_ids),
            )
            for index in range(body.samples)
        ]


@router.post("/v1/chat/completions", response_model=None, responses=RESPONSES)
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answers a chat."""
    return await respond(request, body, understood=_understood, events=_events, whole=_whole)


async def _understood(state: ServerState, request: Request, body: ChatCompletionRequest) -> _Task:
    """Finds the prompt's tokens and the sampling parameters.

    Raises:
        ApiError: 400 or 404.
    """
    model = check_model(state, body.model)
    request_id = request_id_of(request, body, "chatcmpl")
    plan = plan_tools(state.settings, body.tools, body.tool_choice, parallel=body.parallel)
    if plan.structured_outputs is not None and body.structured_outputs is not None:
        raise ApiError(
            400,
            "structured_outputs cannot be had with a tool_choice that makes the answer a call, nor "
            "with strict tools",
            param="structured_outputs",
        )
    check_format(plan, body.response_format.type if body.response_format else "text")
    check_logprobs(state, "top_logprobs", body.top_logprobs)
    state.admission.expect(body.samples)
    if body.truncate_prompt_tokens is None:
        chars = sum(len(text_of(message.content)) for message in body.messages)
        check_length(state, chars, param="messages")
    ids = await chat_prompt(
        state,
        body.messages,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    ids = truncated(state, ids, body.truncate_prompt_tokens, body.limit)
    params = make_params(
        state,
        body,
        max_tokens=room_for(state, len(ids), body.limit, param="messages", limit=body.limit_name),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured_outputs=plan.structured_outputs,
    )
    head = {
        "id": request_id,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }
    job = Job(
        prompts=[ids],
        params=params,
        request_id=request_id,
        arrival_s=request.state.arrival_s,
        body=body,
        parts=plan.parts,
    )
    echo = text_of(body.messages[-1].content) if body.echo else ""
    logprobs = None
    if body.logprobs:
        logprobs = ChatLogprobs(
            TokenBytes(state.llm.tokenizer),
            body.top_logprobs or 0,
            as_ids=bool(body.return_tokens_as_token_ids),
        )
    return _Task(
        head=head, body=body, request=request, job=job, plan=plan, logprobs=logprobs, echo=echo
    )


async def _whole(state: ServerState, task: _Task) -> bytes:
    """The body of a response that is no stream."""
    usage, choices = Usage(), task.choices()
    extra: dict[str, Any] = {}
    async with aclosing(run(state, task.job)) as outputs:
        async for number, output in outputs:
            usage.add(number, output)
            for sample in output.outputs:
                choices[sample.index].add(sample)
            if output.prompt_logprobs is not None:
                extra["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
    if task.body.return_token_ids:
        extra["prompt_token_ids"] = task.job.prompts[0]
    whole = {
        **task.head,
        "object": "chat.completion",
        "choices": [choice.whole() for choice in choices],
        "usage": usage.body(),
        **extra,
    }
    _note(task, usage, choices)
    return encode_json(whole)


async def _events(state: ServerState, task: _Task) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    body, usage, choices = task.body, Usage(), task.choices()
    head = {**task.head, "object": "chat.completion.chunk"}
    # What most clients ask for is a text now and then a little more of it.
    plain = not (
        body.usage_always or body.logprobs or body.return_token_ids or task.plan.make_parser
    )
    told: dict[str, Any] = {"usage": None} if body.include_usage else {}
    chunks = TextChunks(
        lambda index: {**head, "choices": [choices[index].part({"content": HOLE})], **told}
    )
    begun = False
    async with aclosing(run(state, task.job)) as outputs:
        async for number, output in outputs:
            usage.add(number, output)
            if body.usage_always:
                told = {"usage": usage.body()}
            if plain and begun and (more := only_text(output)) is not None:
                if more.text:
                    yield chunks.event(more.index, more.text)
                continue
            events = []
            if not begun:
                begun = True
                ids = {"prompt_token_ids": task.job.prompts[0]} if body.return_token_ids else {}
                events += [
                    event({**head, "choices": [choice.begin()], **told, **ids})
                    for choice in choices
                ]
            events += [
                event({**head, "choices": [choice], **told})
                for sample in output.outputs
                for choice in choices[sample.index].deltas(sample)
            ]
            if events:
                yield b"".join(events)
    _note(task, usage, choices)
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.body()})


def _note(task: _Task, usage: Usage, choices: Sequence[ChatChoice]) -> None:
    note_end(task.request, usage.body(), [choice.finish_reason for choice in choices])
