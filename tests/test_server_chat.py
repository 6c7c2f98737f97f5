"""`/v1/chat/completions` with the `openai` package's own client, against a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

MODEL = "embedded"
USER = {"role": "user", "content": "Hi"}
CHAT: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You write documentation."},
    {"role": "user", "content": "The database"},
]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def rendered(server: RunningServer, chat: Any) -> list[int]:
    tokenizer = server.llm.tokenizer
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_a_chat_is_what_its_template_says(server: RunningServer, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint is not None
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    prompt = rendered(server, CHAT)
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 8)
    same = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert choice.message.content == same.choices[0].text != ""


@pytest.mark.parametrize("logprobs", [False, True])
def test_streams_say_what_whole_answers_say(client: openai.OpenAI, logprobs: bool) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "messages": CHAT, "max_tokens": 12, "n": 3, "seed": 5, "logprobs": logprobs
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert [c.index for chunk in chunks[:3] for c in chunk.choices] == [0, 1, 2]
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:3])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason == choice.finish_reason
        told = [t.token for c in mine if c.logprobs for t in c.logprobs.content or []]
        if choice.logprobs is None:
            assert (told, logprobs) == ([], False)
        else:
            assert told == [token.token for token in choice.logprobs.content or []]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for token in logprobs.content:
        assert token.token == token.top_logprobs[0].token
        assert [len(token.top_logprobs), token.bytes] == [3, list(token.token.encode())]
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert math.fsum(map(math.exp, tops)) <= 1.0001


def test_the_async_client(server: RunningServer) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=server.key, timeout=60
        ) as client:
            calls = [
                client.chat.completions.create(
                    model=MODEL, messages=CHAT, max_tokens=6, temperature=0
                )
                for _ in range(2)
            ]
            texts = [
                str(answer.choices[0].message.content) for answer in await asyncio.gather(*calls)
            ]
            stream = await client.chat.completions.create(
                model=MODEL, messages=CHAT, max_completion_tokens=6, temperature=0, stream=True
            )
            async with stream:
                deltas = [c.delta.content or "" async for chunk in stream for c in chunk.choices]
            return [*texts, "".join(deltas)]

    texts = asyncio.run(ask())
    assert len(set(texts)) == 1


class Release(BaseModel):
    major: int = Field(ge=0, le=99)
    stable: bool


def test_structured_answers_are_parsed(client: openai.OpenAI) -> None:
    # White space without end is JSON, too, and what a model this small writes where it may.
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "seed": 1}
    answer = client.chat.completions.parse(messages=CHAT, response_format=Release, **options)
    assert isinstance(answer.choices[0].message.parsed, Release)
    # An answer may be echoed with all that the client has put into it.
    echo = answer.choices[0].message.model_dump(serialize_as_any=True)
    assert echo["parsed"]
    chat: list[Any] = [*CHAT, echo, {"role": "user", "content": "And?"}]
    again = client.chat.completions.create(
        messages=chat, response_format={"type": "json_object"}, **options
    )
    assert str(again.choices[0].message.content).lstrip().startswith("{")


def test_chunks_are_alike(server: RunningServer) -> None:
    """Of one stream and of any, and none but the last is empty, though tokens were held back."""
    # Its tag tells of no call, and is held back until that shows.
    text = "Yes. <tool_call> is a tag, and so is \u20ac."
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"messages": CHAT, "max_tokens": 60, "stream": True}
    options = [{}, {"tools": [tool], "structured_outputs": {"choice": [text]}, "logprobs": True}]
    with server.http_client() as http:
        for fields in options:
            lines = http.post("/v1/chat/completions", json=body | fields).text.split("\n\n")
            (*chunks, last) = (json.loads(line[6:])["choices"][0] for line in lines[:-2])
            names = ["index", "delta", "logprobs", "finish_reason", "stop_reason"]
            assert all(list(chunk) == names for chunk in [*chunks, last])
            assert all(chunk["delta"].keys() & {"role", "content"} for chunk in chunks)
            assert all(chunk["delta"]["content"] for chunk in chunks[1:])
            assert last["finish_reason"]
    assert "".join(chunk["delta"].get("content", "") for chunk in [*chunks, last]) == text
    told = [chunk["logprobs"]["content"] for chunk in [*chunks, last] if chunk["logprobs"]]
    spoken = bytes(byte for tokens in told for token in tokens for byte in token["bytes"])
    assert spoken.decode().removesuffix("</s>") == text


def test_the_log_tells_who_asked_and_what_it_took(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"max_tokens": 3, "user": "me", "safety_identifier": "id-5", "ignore_eos": True}

    async def logged() -> None:
        while not caplog.records:  # which comes after the response
            await asyncio.sleep(0)

    with server.http_client() as http, caplog.at_level(logging.INFO, "vattn.server.access"):
        for path, prompt in (("chat/", {"messages": CHAT}), ("", {"prompt": "A"})):
            for stream in (False, True):
                caplog.clear()
                body = {**asked, **prompt, "stream": stream}
                assert http.post(f"/v1/{path}completions", json=body).status_code == 200
                server.call(asyncio.wait_for(logged(), 60))
                record: Any = caplog.records[0]
                assert (record.user, record.safety_identifier) == ("me", "id-5")
                assert (record.completion_tokens, record.finish) == (3, "length")
                assert record.prompt_tokens > 0


def test_a_conversation_finds_its_past_in_the_cache(client: openai.OpenAI) -> None:
    chat: list[Any] = [{"role": "user", "content": "A turn that no other test takes. " * 8}]
    before = 0
    for _ in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=chat, max_tokens=24, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached is not None
        assert cached >= before // 2
        before = answer.usage.prompt_tokens
        chat += [answer.choices[0].message, {"role": "user", "content": "And then?"}]


def test_the_last_message_can_be_continued(server: RunningServer, client: openai.OpenAI) -> None:
    chat: list[Any] = [*CHAT, {"role": "assistant", "content": "It keeps"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(messages=chat, extra_body=extra, **options)
    text = str(answer.choices[0].message.content)
    assert text.startswith("It keeps")
    with client.chat.completions.create(
        messages=chat, extra_body=extra, stream=True, **options
    ) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == text


def test_token_ids_are_told(server: RunningServer) -> None:
    body = {"messages": CHAT, "max_tokens": 4, "return_token_ids": True, "prompt_logprobs": 1}
    with server.http_client() as http:
        answer = http.post("/v1/chat/completions", json=body).json()
        body |= {"stream": True, "prompt_logprobs": None}
        lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    prompt = rendered(server, CHAT)
    assert answer["prompt_token_ids"] == prompt
    assert len(answer["prompt_logprobs"]) == len(prompt)
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert events[0]["prompt_token_ids"] == prompt
    assert sum(len(e["choices"][0].get("token_ids") or []) for e in events) <= 4


def test_a_template_of_the_server(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(template: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        settings = replace(server.settings, chat_template=template)
        monkeypatch.setattr(server.state, "settings", settings)
        with server.http_client() as http:
            body = {"messages": [{"role": "developer", "content": "Hi"}], "max_tokens": 1, **fields}
            response = http.post("/v1/chat/completions", json=body)
            return response.status_code, response.json()

    status, refused = answer("{{ raise_exception('Users first, please.') }}")
    assert (status, refused["error"]["param"]) == (400, "messages")
    assert "Users first, please." in refused["error"]["message"]
    status, refused = answer("{{ messages[7].content }}")
    assert status == 400
    status, refused = answer("")
    assert (status, refused["error"]["param"]) == (400, "messages")
    tokens = server.llm.tokenizer.encode("system word", add_special_tokens=False)
    status, whole = answer(
        "{{ messages[0].role }} {{ this }}",
        chat_template_kwargs={"this": "word"},
        return_token_ids=True,
    )
    assert whole["prompt_token_ids"] == tokens


def test_no_template_is_told(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", None)
    with server.http_client() as http:
        response = http.post("/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]
