"""What no decent client sends, and what decent clients see of errors."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.running_server import PATIENCE_S, RunningServer, paused, running_server
from tests.test_server_operation import posted

SHORT = {"prompt": "A transaction is", "max_tokens": 2}
LONG = {**SHORT, "max_tokens": 400, "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"


@pytest.fixture(scope="module")
def _server() -> Iterator[RunningServer]:
    with running_server(
        api_keys=("key",), max_num_seqs=2, max_queued_requests=0, max_queued_tokens=2000
    ) as server:
        yield server


@pytest.fixture
def server(_server: RunningServer) -> Iterator[RunningServer]:
    yield _server
    _server.wait_idle()
    _server.state.admission.check()


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http_client() as client:
        yield client


def completion(body: bytes, *headers: bytes, kind: bytes = b"application/json") -> bytes:
    lines = [b"Content-Type: " + kind, b"Content-Length: %d" % len(body), *headers]
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def exchange(server: RunningServer, *parts: bytes, end: bool = False) -> bytes:
    """Sends these; what comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        for part in parts:
            sock.sendall(part)
        if end:
            sock.shutdown(socket.SHUT_WR)
        found = b""
        while data := sock.recv(1 << 16):
            found += data
        return found


def statuses(told: bytes) -> list[int]:
    return [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "[99999999999999999999]"),
        ("prompt", "[-1]"),
        ("prompt", "[[1], [-9999999999999999999999]]"),
        ("max_tokens", "9" * 400),
        ("max_tokens", "NaN"),
        ("max_tokens", "1e999"),
        ("temperature", "Infinity"),
        ("n", "99999999999999999999"),
        ("seed", "9223372036854775808"),
        ("logprobs", "99999999999999999999"),
        ("stop_token_ids", "[99999999999999999999]"),
        ("allowed_token_ids", "[99999999999999999999]"),
        ("logit_bias", '{"99999999999999999999": 1}'),
        ("logit_bias", '{"\\u0665": 1}'),
        ("priority", "-1e400"),
        ("wröng", "1"),
    ],
)
def test_bad_numbers_are_told_with_their_field(
    client: httpx.Client, field: str, value: str
) -> None:
    given = {"prompt": '"a"', "max_tokens": "2", field: value}
    body = "{" + ", ".join(f'"{name}": {text}' for name, text in given.items()) + "}"
    response = client.post(
        "/v1/completions", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == field
    assert "Error:" not in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("kind", [b"text/plain", b"application/x-www-form-urlencoded", b"\xff"])
def test_only_json_is_read(server: RunningServer, kind: bytes) -> None:
    body = json.dumps(SHORT).encode()
    told = exchange(server, completion(body, b"Connection: close", kind=kind))
    assert statuses(told) == [400]
    assert b"application/json" in told


def test_of_two_values_the_last_one_counts(client: httpx.Client) -> None:
    body = b'{"prompt": 5, "prompt": "a", "max_tokens": 9, "max_tokens": 1}'
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.json()["usage"]["completion_tokens"] == 1


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    body, stream = json.dumps(SHORT).encode(), json.dumps({**SHORT, "stream": True}).encode()
    told = exchange(
        server,
        completion(body)
        + completion(b"{")
        + completion(stream)
        + completion(body, b"Connection: close"),
    )
    assert statuses(told) == [200, 400, 200, 200]
    assert told.index(b"[DONE]") > told.index(b"the body is no JSON")


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Request-Id: a\rb\r\n\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_http_gets_400(server: RunningServer, junk: bytes) -> None:
    told = exchange(server, junk)
    assert statuses(told) == [400]
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_clients_that_end_in_the_middle_leave_nothing(server: RunningServer) -> None:
    whole = completion(json.dumps(LONG).encode())
    head = whole.index(b"\r\n\r\n") + 4
    for sent in (whole[:20], whole[:head], whole[: head + 5], whole[:-1]):
        assert exchange(server, sent, end=True) == b""
    server.wait_idle()
    assert server.state.admission.samples == 0


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1", "\x00", "ä", "", "x" * 200, "a\u2028b"])
def test_ids_cannot_carry_headers(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/completions", json={**SHORT, "request_id": name})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "request_id"
    assert "x-evil" not in response.headers
    told = client.get("/v1/models/" + "".join(f"%{byte:02x}" for byte in name.encode()))
    assert "x-evil" not in told.headers


def test_nobody_is_redirected(client: httpx.Client) -> None:
    for path in ("/health/", "/v1/completions/", "//v1/models"):
        response = client.get(path, headers={"Host": "example.com"})
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "error", "status"),
    [
        ({"temperature": -1}, openai.BadRequestError, 400),
        ({"model": "other"}, openai.NotFoundError, 404),
        ({"max_tokens": 480, "n": 40}, openai.APIStatusError, 413),
    ],
)
def test_errors_are_those_of_the_client(
    server: RunningServer, body: dict[str, Any], error: type[Exception], status: int
) -> None:
    with server.client() as client, pytest.raises(error) as caught:
        client.completions.create(**{"model": "embedded", **SHORT, **body})
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_wrong_key_is_an_authentication_error(server: RunningServer) -> None:
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_full_server_is_a_rate_limit(server: RunningServer) -> None:
    create: Any
    with server.client() as client, paused(server.llm):
        create = client.completions.create
        with posted(server, LONG), posted(server, LONG):
            server.wait_running(2)
            with pytest.raises(openai.RateLimitError) as caught:
                create(model="embedded", **SHORT)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_draining_server_is_an_internal_error_for_now(server: RunningServer) -> None:
    admission = server.state.admission
    with server.client() as client:
        admission.drain()
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="embedded", **SHORT)  # type: ignore[call-overload]
        finally:
            admission._draining = False
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_full_server_that_drains_ends_when_they_do(server: RunningServer) -> None:
    admission = server.state.admission
    with server.http_client() as client:
        body = {**LONG, "max_tokens": 60, "stream": True}
        with (
            client.stream("POST", "/v1/completions", json=body) as first,
            client.stream("POST", "/v1/completions", json=body) as second,
        ):
            admission.drain()
            try:
                refused = client.post("/v1/completions", json=SHORT)
                assert refused.status_code == 503
                assert first.read().endswith(b"data: [DONE]\n\n")
                assert second.read().endswith(b"data: [DONE]\n\n")
                server.call(admission.wait_idle())
            finally:
                admission._draining = False
