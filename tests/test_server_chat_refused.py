"""What `/v1/chat/completions` refuses, and that it names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
OTHER = {"type": "function", "function": {"name": "g"}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
STRICT_TOOL = {"type": "function", "function": {"name": "h", "strict": True}}
JSON = {"response_format": {"type": "json_object"}}
STRUCTURE = {"begin": "<a>", "schema": {}, "end": "</a>"}
TAG = {
    "response_format": {"type": "structural_tag", "triggers": ["<a>"], "structures": [STRUCTURE]}
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
ARGUMENTS = "messages[0].tool_calls[0].function.arguments"
OFF = "not supported"

MESSAGES: list[tuple[Any, str, str]] = [
    ([], "messages", "at least 1"),
    ([USER, {"role": "function", "content": "x"}], "messages[1].role", "one of system"),
    ([{"content": "x"}], "messages[0].role", "missing"),
    (["x"], "messages[0]", "must be an object"),
    ([{"role": "user"}], "messages[0].content", "missing"),
    ([{"role": "user", "content": 5}], "messages[0].content", "must be text"),
    ([{"role": "user", "content": []}], "messages[0].content", "at least 1"),
    ([USER, {"role": "user", "content": [IMAGE]}], "messages[1].content[0].type", "image_url"),
    ([{"role": "assistant", "content": None}], "messages[0].content", "tool_calls"),
    ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal", OFF),
    ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages[0].audio", OFF),
    ([{"role": "assistant", "function_call": {}}], "messages[0].function_call", OFF),
    ([{"role": "assistant", "tool_calls": [CALL]}], ARGUMENTS, "no JSON"),
    ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id", "missing"),
    ([{**USER, "mood": "good"}], "messages[0].mood", OFF),
    ([{"role": "user", "content": "word " * 3000}], "messages", "maximum context"),
]
FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "own name"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "custom"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": "often", "tools": [TOOL]}, "tool_choice", "none"),
    ({"tool_choice": OTHER, "tools": [TOOL]}, "tool_choice.function.name", "among"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "tool_choice.type", OFF),
    (
        {"tool_choice": "required", "tools": [TOOL], "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "a call",
    ),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"max_tokens": 600}, "max_tokens", "maximum context"),
    ({"max_completion_tokens": 600}, "max_completion_tokens", "maximum context"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "needs tools"),
    ({"tools": [TOOL], "tool_choice": "required", **JSON}, "response_format", "it is one"),
    ({"tools": [TOOL], "tool_choice": TOOL, **JSON}, "response_format", "it is one"),
    ({"tools": [TOOL], "tool_choice": TOOL, **TAG}, "response_format", "it is one"),
    ({"tools": [TOOL], **JSON}, "response_format", "it may be one"),
    ({"tools": [STRICT_TOOL], **TAG}, "response_format", "it may be one"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias.5", "100"),
    ({"prompt_cache_key": "a"}, "prompt_cache_key", OFF),
    ({"metadata": {"a": "b"}}, "metadata", OFF),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", OFF),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
    ({"echo": True}, "echo", "continue_final_message"),
    ({"reasoning_effort": "high"}, "reasoning_effort", OFF),
    ({"modalities": ["text", "audio"]}, "modalities", OFF),
    ({"functions": [{"name": "f"}]}, "functions", OFF),
    ({"tools": [{}]}, "tools[0].function", "missing"),
    ({"tools": ["f"]}, "tools[0]", "must be an object"),
    ({"response_format": {}}, "response_format.type", "missing"),
    ({"n": 1.5}, "n", "n=1.5 must be a whole number"),
    ({"temprature": 1}, "temprature", OFF),
]
BODIES = [({"messages": messages}, *rest) for messages, *rest in MESSAGES]
BODIES += [({"messages": [USER], **fields}, *rest) for fields, *rest in FIELDS]


@pytest.mark.parametrize(("body", "param", "message"), [({}, "messages", "missing"), *BODIES])
def test_what_is_refused(
    server: RunningServer, body: dict[str, Any], param: str, message: str
) -> None:
    with server.http_client() as http:
        response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


@pytest.mark.parametrize(
    "fields", [{"tools": [TOOL], "tool_choice": "none", **JSON}, {"tools": [TOOL], **TAG}]
)
def test_formats_that_go_with_tools(server: RunningServer, fields: dict[str, Any]) -> None:
    with server.http_client() as http:
        body = {"messages": [USER], "max_tokens": 2, **fields}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_fields_that_ask_for_nothing_are_taken(server: RunningServer) -> None:
    nulls = ("audio", "functions", "prediction", "reasoning_effort", "tools", "tool_choice", "stop")
    body = {
        "messages": [USER],
        "max_tokens": 1,
        "store": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        **dict.fromkeys(nulls),
    }
    with server.http_client() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
