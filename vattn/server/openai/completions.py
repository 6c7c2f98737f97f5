"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from vattn.outputs import CompletionOutput, RequestOutput
from vattn.server.openai.common import (
    INT64,
    SamplingFields,
    check_model,
    note_end,
    refused,
    request_id_of,
)
from vattn.server.openai.documents import RESPONSES
from vattn.server.openai.logprobs import CompletionLogprobs, Entry, prompt_logprobs_body
from vattn.server.openai.off import COMMON_OFF, Off
from vattn.server.openai.respond import respond
from vattn.server.openai.run import Job, finish_reason, run, stop_reason
from vattn.server.openai.sampling import (
    check_length,
    encode_all,
    make_params,
    room_for,
    truncated,
)
from vattn.server.openai.sse import HOLE, TextChunks, encode_json, event, only_text
from vattn.server.openai.usage import Usage
from vattn.server.state import ServerState

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


def _prompt(given: Any) -> Any:
    """Any of the forms. By hand: of a million wrong items pydantic would tell each."""
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given:
        kinds = set(map(type, given))
        if kinds in ({str}, {int}):
            return given
        if kinds == {list} and all(ids and set(map(type, ids)) == {int} for ids in given):
            return given
    raise PydanticCustomError(
        "prompt", "it must be text, texts, token ids, or lists of token ids, and not empty"
    )


_Prompt = Annotated[
    Any,
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionBody(SamplingFields):
    """What ``/v1/completions`` takes; null is as left out."""

    OFF: ClassVar[Off] = {**COMMON_OFF, "suffix": ("",), "prompt_embeds": ()}

    prompt: _Prompt
    max_tokens: int | None = Field(None, ge=0, lt=INT64, description="16 if left out; 0 with echo.")
    logprobs: int | None = Field(None, ge=0, lt=INT64)
    echo: bool | None = None
    best_of: int | None = Field(None, description="As `n`, or left out.")
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> CompletionBody:
        if self.best_of not in (None, self.samples):
            raise refused("best_of", "best_of is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens=0 needs echo; use 1 or more")
        return self


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A request that has been understood.

    Args:
        head: fields that all its responses begin with.
        body: what was asked for.
        job: for the engine.
        decode: token ids to text, for ``echo``.
        request: for its line in the log.
    """

    head: dict[str, Any]
    body: CompletionBody
    job: Job
    decode: Callable[[list[int]], str]
    request: Request

    def echoed(self, number: int) -> str:
        """The text of a prompt: as it was given, unless that were token ids or it was cut."""
        prompt, ids = self.body.prompt, self.job.prompts[number]
        text = prompt if isinstance(prompt, str) else prompt[number]
        if isinstance(text, str) and self.body.truncate_prompt_tokens is None:
            return text
        return self.decode(ids)


@router.post("/v1/completions", response_model=None, responses=RESPONSES)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continues one prompt or several."""
    return await respond(request, body, understood=_understood, events=_events, whole=_whole)


async def _understood(state: ServerState, request: Request, body: CompletionBody) -> _Task:
    """Finds the prompts' tokens and the sampling parameters.

    Raises:
        ApiError: 400 or 404.
    """
    model = check_model(state, body.model)
    request_id = request_id_of(request, body, "cmpl")
    state.admission.expect(_count(body.prompt) * body.samples)
    asked = body.max_tokens
    prompts = await _token_ids(state, body)
    room = DEFAULT_MAX_TOKENS if asked is None else asked
    prompts = [truncated(state, ids, body.truncate_prompt_tokens, room) for ids in prompts]
    if asked is None:
        room = min(room_for(state, len(ids), None, param="prompt") for ids in prompts)
        most = min(room, DEFAULT_MAX_TOKENS)
    else:
        most = min(room_for(state, len(ids), asked or 1, param="prompt") for ids in prompts)
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        scored = max(body.logprobs, scored or 0)
    params = make_params(
        state, body, max_tokens=most, logprobs=body.logprobs, prompt_logprobs=scored
    )
    head = {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    job = Job(
        prompts=prompts,
        params=params,
        request_id=request_id,
        arrival_s=request.state.arrival_s,
        body=body,
    )
    return _Task(head=head, body=body, job=job, request=request, decode=state.llm.tokenizer.decode)


def _count(prompt: Any) -> int:
    """How many prompts are in one field."""
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


async def _token_ids(state: ServerState, body: CompletionBody) -> list[list[int]]:
    prompts: Any = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(prompts[0], str):
        if body.truncate_prompt_tokens is None:
            check_length(state, max(map(len, prompts)), param="prompt")
        special = body.add_special_tokens is not False
        return await encode_all(state.llm, prompts, add_special_tokens=special)
    found: list[list[int]] = [prompts] if isinstance(prompts[0], int) else prompts
    return found


async def _whole(state: ServerState, task: _Task) -> bytes:
    """The body of a response that is no stream."""
    usage, choices = Usage(), _Choices(task)
    async with aclosing(run(state, task.job)) as outputs:
        found = []
        async for number, output in outputs:
            usage.add(number, output)
            found += choices.of(number, output)
    found.sort(key=lambda choice: choice["index"])
    told = choices.counted(usage)
    note_end(task.request, told, choices.reasons)
    return encode_json({**task.head, "choices": found, "usage": told})


async def _events(state: ServerState, task: _Task) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    body, usage, choices = task.body, Usage(), _Choices(task)
    # What most clients ask for is a text now and then a little more of it.
    plain = not (
        body.echo or body.return_token_ids or body.usage_always or body.logprobs is not None
    )
    nothing: dict[str, Any] = {"usage": None} if body.include_usage else {}
    chunks = TextChunks(lambda index: {**task.head, "choices": [_part(index, HOLE)], **nothing})
    async with aclosing(run(state, task.job)) as outputs:
        async for number, output in outputs:
            usage.add(number, output)
            if plain and (more := only_text(output)) is not None:
                if more.text:
                    yield chunks.event(number * body.samples + more.index, more.text)
                continue
            if body.usage_always:
                nothing = {"usage": choices.counted(usage)}
            events = [
                event({**task.head, "choices": [choice], **nothing})
                for choice in choices.of(number, output)
            ]
            if events:
                yield b"".join(events)
    told = choices.counted(usage)
    note_end(task.request, told, choices.reasons)
    if body.include_usage:
        yield event({**task.head, "choices": [], "usage": told})


def _part(index: int, text: str) -> dict[str, Any]:
    """A choice that tells text only; more is put into it."""
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


class _Choices:
    """Makes choices of outputs, and remembers what of each has been told.

    Args:
        task: what was asked for.
    """

    def __init__(self, task: _Task) -> None:
        self._task = task
        self.reasons: list[str | None] = []  # of all outputs; None of those that end nothing
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of choices that have begun
        self._prompt_logprobs: dict[int, list[Entry | None]] = {}
        self._only_prompt = task.body.max_tokens == 0  # a token was made that nobody wants

    def of(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices of an output of a prompt, by its number."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs.setdefault(number, []).extend(output.prompt_logprobs)
        return [self._choice(number, output, sample) for sample in output.outputs]

    def counted(self, usage: Usage) -> dict[str, Any]:
        """The usage as it is told."""
        if self._only_prompt:
            usage.completion_tokens = 0
        return usage.body()

    def _choice(
        self, number: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any]:
        body = self._task.body
        index = number * body.samples + sample.index
        text, token_ids, entries = sample.text, sample.token_ids, sample.logprobs
        if self._only_prompt:
            text, token_ids, entries = "", [], entries and []
        is_first = index not in self._logprobs
        if is_first:
            self._logprobs[index] = CompletionLogprobs(
                self._task.decode, as_ids=bool(body.return_tokens_as_token_ids)
            )
        told: list[int] = token_ids
        scores: list[Entry | None] = list(entries or ())
        if body.echo and is_first:
            text = self._task.echoed(number) + text
            known = self._prompt_logprobs.get(number, [])
            unknown = len(output.prompt_token_ids) - len(known)  # it ended before they were scored
            told = [*output.prompt_token_ids, *told]
            scores = [*known, *[None] * unknown, *scores]
        choice = _part(index, text)
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs[index].add(told, scores, body.logprobs)
        choice["finish_reason"] = finish_reason(sample.finish_reason)
        self.reasons.append(choice["finish_reason"])
        choice["stop_reason"] = stop_reason(sample.finish_reason, sample.stop_reason)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(self._prompt_logprobs.get(number))
        if body.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if is_first else None
        return choice
