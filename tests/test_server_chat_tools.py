"""Tool calls with the `openai` package's own client, against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

MODEL = "embedded"
USER: Any = {"role": "user", "content": "What is the weather in Turin?"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place",
            "parameters": {
                "type": "object",
                "properties": {"days": {"$ref": "#/$defs/Days"}},
                "required": ["days"],
                "additionalProperties": False,
                "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clock",
            "parameters": {
                "type": "object",
                "properties": {"utc": {"type": "boolean"}},
                "required": ["utc"],
                "additionalProperties": False,
            },
        },
    },
]

# Its arguments are longer than an answer may be.
_PLACES = {"type": "string", "minLength": 300}
LONG: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"places": _PLACES},
                "required": ["places"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def forced(text: str) -> dict[str, Any]:
    """Makes any model say it, and what comes of it."""
    return {"structured_outputs": {"regex": re.escape(text).replace("\\ ", " ")}}


def ask(client: openai.OpenAI, **options: Any) -> Any:
    given = {"model": MODEL, "messages": [USER], "tools": TOOLS, "max_tokens": 120, "seed": 3}
    return client.chat.completions.create(**{**given, **options}).choices[0]


def ask_streaming(client: openai.OpenAI, **options: Any) -> tuple[str, list[dict[str, str]], str]:
    """Content, calls put together of their deltas, and the finish reason."""
    given = {"model": MODEL, "messages": [USER], "tools": TOOLS, "max_tokens": 120, "seed": 3}
    content = ""
    calls: list[dict[str, str]] = []
    reasons: list[str] = []
    with client.chat.completions.create(**{**given, **options}, stream=True) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(calls)
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert len(reasons) == 1
    return content, calls, reasons[0]


HERMES = (
    'Let me see.\n<tool_call>{"name": "weather", "arguments": {"days": 3}}</tool_call>\n'
    '<tool_call>{"name": "clock", "arguments": {"utc": true}}</tool_call>'
)
LLAMA = (
    '{"name": "weather", "parameters": {"days": 3}}; {"name": "clock", "parameters": {"utc": true}}'
)
CALLS = [("weather", '{"days": 3}'), ("clock", '{"utc": true}')]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("parser", "text", "said"), [("hermes", HERMES, "Let me see."), ("llama3_json", LLAMA, None)]
)
def test_calls_that_the_model_chooses(
    server: RunningServer,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    parser: str,
    text: str,
    said: str | None,
    parallel: bool,
) -> None:
    settings = replace(server.settings, tool_call_parser=parser)
    monkeypatch.setattr(server.state, "settings", settings)
    options = {"extra_body": forced(text), "parallel_tool_calls": parallel}
    expected = CALLS if parallel else CALLS[:1]
    choice = ask(client, **options)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == said
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == expected
    assert len({call.id for call in calls}) == len(calls)
    content, streamed, reason = ask_streaming(client, **options)
    assert [(call["name"], call["arguments"]) for call in streamed] == expected
    assert (content, reason) == (said or "", "tool_calls")


def test_text_that_only_looks_like_a_call(client: openai.OpenAI) -> None:
    text = '<tool_call>{"name": "weather"}</tool_call> is how.'
    choice = ask(client, extra_body=forced(text))
    assert (choice.message.content, choice.message.tool_calls) == (text, None)
    assert choice.finish_reason == "stop"
    assert ask_streaming(client, extra_body=forced(text)) == (text, [], "stop")
    none = ask(client, extra_body=forced(HERMES), tool_choice="none")
    assert (none.message.content, none.message.tool_calls) == (HERMES, None)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_function_is_called(client: openai.OpenAI, seed: int) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    whole = ask(client, tool_choice=choice, seed=seed)
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["days"] in range(1, 10)
    content, streamed, reason = ask_streaming(client, tool_choice=choice, seed=seed)
    assert (content, reason) == ("", "tool_calls")
    assert [each["arguments"] for each in streamed] == [call.function.arguments]


@pytest.mark.parametrize("parallel", [True, False])
def test_some_function_is_called(client: openai.OpenAI, parallel: bool) -> None:
    options = {"tool_choice": "required", "parallel_tool_calls": parallel}
    whole = ask(client, **options)
    _, streamed, reason = ask_streaming(client, **options)
    # Without a limit, a model this small may call until its tokens are used up.
    assert whole.finish_reason == reason == "tool_calls" or parallel
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert [(each["name"], each["arguments"]) for each in streamed][: len(calls)] == calls
    assert len(calls) == 1 or parallel
    for name, arguments in calls:
        value = json.loads(arguments)
        assert value["days"] in range(1, 10) if name == "weather" else value["utc"] in (True, False)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}
CUT = 'Let me see.\n<tool_call>{"name": "weather", "arguments": {"days": 333333333333333'


@pytest.mark.parametrize(
    ("options", "begin"),
    [
        ({"tool_choice": "required", "tools": LONG}, "{"),
        ({"tool_choice": NAMED, "tools": LONG}, "{"),
        ({"extra_body": forced(CUT)}, '{"days": 333'),
        ({"tool_choice": NAMED, "tools": LONG, "stop": "s"}, "{"),
    ],
)
def test_a_call_that_is_cut_off(client: openai.OpenAI, options: Any, begin: str) -> None:
    """By the length or a stop string: a stream and a whole answer tell the same part of it."""
    options = {"max_tokens": 40, **options}
    whole = ask(client, **options)
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert call.function.arguments.startswith(begin)
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)
    assert whole.finish_reason == ("stop" if "stop" in options else "length")
    content, streamed, reason = ask_streaming(client, **options)
    assert (content, reason) == (whole.message.content or "", whole.finish_reason)
    assert [each["arguments"] for each in streamed] == [call.function.arguments]


def test_a_whole_tool_loop(server: RunningServer, client: openai.OpenAI) -> None:
    choice = ask(client, extra_body=forced(HERMES))
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        for call in choice.message.tool_calls
    ]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[USER, choice.message, *results],
        tools=TOOLS,
        max_tokens=8,
        extra_body={"return_token_ids": True},
    )
    prompt = server.llm.tokenizer.decode(answer.prompt_token_ids)  # type: ignore[attr-defined]
    assert HERMES in prompt
    assert prompt.endswith("sunny\n\nsunny\n\n")
    assert answer.choices[0].message.role == "assistant"


def test_auto_needs_a_server_set_up_for_it(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(server.settings, enable_auto_tool_choice=False)
    monkeypatch.setattr(server.state, "settings", settings)
    with server.http_client() as http:
        body = {"messages": [USER], "tools": TOOLS, "max_tokens": 1}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "--enable-auto-tool-choice" in response.json()["error"]["message"]
        body["tool_choice"] = "none"
        assert http.post("/v1/chat/completions", json=body).status_code == 200
