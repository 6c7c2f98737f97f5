"""Requests that are made of the server's OpenAPI document, good ones and bad ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from requests import Session
from schemathesis import GenerationMode
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.core.transport import DEFAULT_MAX_STREAM_EVENTS
from schemathesis.specs.openapi.checks import (
    positive_data_acceptance,
    response_schema_conformance,
)

from tests.running_server import RunningServer, running_server

OPERATIONS = {  # with how many requests each is sent
    "GET /health": 2,
    "GET /version": 2,
    "GET /metrics": 2,
    "GET /live/snapshot": 2,
    "GET /v1/models": 2,
    "GET /v1/models/{name}": 6,
    "POST /v1/completions": 25,
    "POST /v1/chat/completions": 25,
    "POST /tokenize": 20,
    "POST /detokenize": 15,
    "GET /admin/memory": 2,
    "POST /admin/memory": 15,
    "POST /admin/reset_prefix_cache": 2,
}
NO_FIELDS = {"GET /health", "GET /version", "GET /metrics"}  # nothing of them can be wrong
MODES = [
    pytest.param(operation, mode, id=f"{operation}-{mode.value}")
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation not in NO_FIELDS
]
GENERATING = {"/v1/completions", "/v1/chat/completions"}
# Fields of prompts that do not speak of messages.
PLAIN = {"prompt", "max_tokens", "temperature", "n", "echo", "stream", "stop", "return_token_strs"}
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(
        api_keys=("key",), enable_auto_tool_choice=True, tool_call_parser="hermes", max_num_seqs=8
    ) as server:
        yield server


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as session:
        session.headers["Authorization"] = "Bearer key"
        yield session


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    project = ProjectConfig(generation=GenerationConfig(deterministic=True, database="none"))
    return schemathesis.openapi.from_url(
        f"{server.url}/openapi.json",
        headers={"Authorization": "Bearer key"},
        config=SchemathesisConfig(projects=ProjectsConfig(default=project)),
    )


def test_every_operation_is_tested(schema: Any) -> None:
    found = {f"{o.method.upper()} {o.path}" for o in (r.ok() for r in schema.get_all_operations())}
    assert found - {"GET /live"} == OPERATIONS.keys()


@pytest.mark.parametrize(("operation", "mode"), MODES)
def test_requests_of_the_document(
    server: RunningServer, session: Session, schema: Any, operation: str, mode: Any
) -> None:
    method, path = operation.split()
    counts: Counter[int] = Counter()

    @settings(
        max_examples=OPERATIONS[operation],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(mode))
    def sends(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = servable(case.body)
        case.body = quick(path, case.body)
        response = case.call(session=session, timeout=TIMEOUT_S)
        counts[response.status_code] += 1
        unchecked: list[Any] = [positive_data_acceptance]  # of two fields one may exclude the other
        if "text/event-stream" in "".join(response.headers.get("content-type", [])):
            unchecked.append(response_schema_conformance)
            check_events(schema, response.text, path)
        case.validate_response(response, excluded_checks=unchecked)

    sends()
    if mode is GenerationMode.POSITIVE and "{" not in path:
        assert counts[200], counts
    assert server.llm.restarts == 0


def check_events(schema: Any, text: str, path: str) -> None:
    """They are as the document says, as responses are."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    if len(events) < DEFAULT_MAX_STREAM_EVENTS:  # after so many schemathesis reads no further
        assert events.pop() == "data: [DONE]"
    elif events[-1] == "data: [DONE]":
        events.pop()
    raw = schema.raw_schema
    content = raw["paths"][path]["post"]["responses"]["200"]["content"]
    documented = content["application/json"]["schema"]
    if path != "/v1/completions":
        documented = {"$ref": "#/components/schemas/ChatCompletionChunk"}
    documented = {**documented, "components": raw["components"]}
    for event in events:
        assert event.startswith("data: "), event
        data = json.loads(event[6:])
        if "error" not in data:
            jsonschema_rs.validate(documented, data)


def quick(path: str, body: Any) -> Any:
    """With few tokens."""
    if not isinstance(body, dict):
        return body
    out = dict(body)
    if path in GENERATING:
        out.setdefault("max_tokens", 4)
        for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 2)):
            if type(out.get(name)) is int and out[name] > most:
                out[name] = most
    return out


def servable(body: Any) -> Any:
    """Without some of what the document cannot say."""
    if not isinstance(body, dict):
        return body
    out = dict(body)
    if "tokens" in out:
        out["tokens"] = [token % 2048 for token in out["tokens"]]
    if isinstance(out.get("budget"), int):
        out["budget"] = (1 << 20) + out["budget"] % (1 << 30)
    for message in out.get("messages") or []:
        if isinstance(message, dict) and message.get("role") == "assistant":
            message.setdefault("content", "yes")
            message.pop("tool_calls", None)
    if "tokens" not in out and "budget" not in out and not out.get("messages"):
        out = {name: out[name] for name in out if name in PLAIN}
        out.setdefault("prompt", "text")
    return out
