"""The server's operation: keys, limits, slow clients, ids, CORS, memory, disconnects."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import PATIENCE_S, RunningServer, running_server
from vattn.server.auth import Keys

pytest_plugins = ("tests.server_fixtures",)

LONG = {"prompt": "A transaction is", "max_tokens": 400, "ignore_eos": True}
SHORT = {"prompt": "A transaction is", "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    """With keys, CORS, and limits that are easily met."""
    with running_server(
        api_keys=("one", "zwö"),
        admin_keys=("boss",),
        allowed_origins=("https://example.org",),
        max_body_bytes=1 << 20,
        body_timeout_s=0.5,
        max_queued_requests=0,
        max_queued_tokens=900,
        max_num_seqs=2,
    ) as server:
        yield server


@pytest.fixture
def client(guarded: RunningServer) -> Iterator[httpx.Client]:
    with guarded.http_client() as client:
        yield client
    guarded.wait_idle()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def exchange(server: RunningServer, *parts: bytes) -> bytes:
    """Sends bytes on a connection of its own; what comes until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        for part in parts:
            sock.sendall(part)
        found = b""
        while data := sock.recv(1 << 16):
            found += data
        return found


@pytest.mark.parametrize(
    "value", [None, "Bearer", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer zwo"]
)
def test_wrong_keys_are_refused(guarded: RunningServer, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    with httpx.Client(base_url=guarded.url, headers=headers) as client:
        for path in ("/v1/models", "/live/snapshot", "/openapi.json", "/nothing", "/admin/memory"):
            response = client.get(path)
            assert error_of(response, 401)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/version", "/metrics", "/"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("key", ["one", "zwö", "boss"])
def test_each_key_lets_in(guarded: RunningServer, key: str) -> None:
    headers = {b"Authorization": b"bearer " + key.encode()}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(["a", "b", "c"])
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("vattn.server.auth.hmac.compare_digest", compare)
    assert keys.have(b"a")
    assert not keys.have(b"x")
    assert len(compared) == 6
    assert {len(part) for pair in compared for part in pair} == {32}


def test_orders_need_an_admins_key(client: httpx.Client) -> None:
    assert error_of(client.get("/admin/memory"), 403)["type"] == "permission_error"
    found = client.get("/admin/memory", headers={"Authorization": "Bearer boss"}).json()
    assert found["pool"]


def test_without_any_key_nobody_gives_orders(server: RunningServer) -> None:
    with server.http_client() as client:
        response = client.post("/admin/memory", json={"budget": "1GiB"})
    assert "--admin-api-key" in error_of(response, 403)["message"]


def test_memory_goes_down_and_up(guarded: RunningServer, client: httpx.Client) -> None:
    client.headers["Authorization"] = "Bearer boss"
    assert client.post("/v1/completions", json=LONG).status_code == 200
    before = client.get("/admin/memory").json()["pool"]
    down = client.post("/admin/memory", json={"budget": 1 << 20}).json()
    assert down["budget"] == 1 << 20 < down["budget_before"]
    assert down["created"] <= 1 << 20
    assert down["returned"] == down["created_before"] - down["created"]
    assert client.post("/v1/completions", json=SHORT).status_code == 200
    up = client.post("/admin/memory", json={"budget": f"{down['budget_before']}"}).json()
    assert up["budget"] == down["budget_before"]
    assert client.post("/admin/reset_prefix_cache").status_code == 200
    assert before


@pytest.mark.parametrize("budget", ["much", -1, 0, True, None, 1.5, "1e400GiB", 2**70])
def test_a_budget_must_be_a_size(client: httpx.Client, budget: object) -> None:
    client.headers["Authorization"] = "Bearer boss"
    response = client.post("/admin/memory", json={"budget": budget})
    assert error_of(response, 400)["param"] == "budget"


def test_large_bodies_are_refused_unread(guarded: RunningServer) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer one\r\n"
        b"Content-Type: application/json\r\n"
    )
    told = exchange(guarded, head + b"Content-Length: 104857600\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 413 ")
    assert b"--max-body-bytes" in told


def test_large_bodies_are_refused_while_they_come(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * (1 << 20)

    for body in (b"x" * (100 << 20), endless()):
        try:
            response = client.post("/v1/completions", content=body)
        except httpx.TransportError:  # it was cut off while it sent
            continue
        assert error_of(response, 413)["code"] == "request_too_large"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"1" * 10_000,
        b"null",
        b"\x00",
    ],
    ids=range(10),
)
def test_malformed_json(client: httpx.Client, body: bytes) -> None:
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_brackets_in_strings_are_no_depth(client: httpx.Client) -> None:
    body = {**SHORT, "prompt": 'a "[' * 60 + "\\"}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_slow_clients_are_cut_off(guarded: RunningServer) -> None:
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    for parts in ([b""], [b"GET / HT"], [post, b"Authorization: Bearer one\r\n\r\n", b"{"]):
        assert exchange(guarded, *parts).startswith(b"HTTP/1.1 408 "), parts
    # One without a key has had its answer, and must not hold the connection either.
    told = exchange(guarded, post + b"\r\n", b"{")
    assert told.startswith(b"HTTP/1.1 401 ")
    assert b" 408 " not in told


def test_heads_are_limited(guarded: RunningServer) -> None:
    told = exchange(guarded, b"GET / HTTP/1.1\r\nX: ", *[b"x" * 4096] * 16)
    assert told.startswith(b"HTTP/1.1 431 ")
    assert exchange(guarded, b"no http\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_full_queue_answers_429(guarded: RunningServer, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
        next(first.iter_raw())
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as second:
            next(second.iter_raw())
            response = client.post("/v1/completions", json=SHORT)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    guarded.wait_idle()
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_what_never_fits_is_not_told_to_retry(client: httpx.Client) -> None:
    many = client.post("/v1/completions", json={**SHORT, "prompt": ["a", "b", "c"]})
    assert "retry-after" not in many.headers
    assert error_of(many, 413)["message"].startswith("3 prompts")
    tokens = client.post("/v1/completions", json={**LONG, "n": 3})
    assert "tokens" in error_of(tokens, 413)["message"]


def test_a_request_may_take_so_long() -> None:
    with running_server(request_timeout_s=0.3) as server, server.client() as client:
        found = client.completions.create(model="embedded", **LONG)  # type: ignore[call-overload]
        assert 0 < found.usage.completion_tokens < LONG["max_tokens"]


def test_cors_is_for_those_who_were_named(guarded: RunningServer, server: RunningServer) -> None:
    for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        told = httpx.options(f"{guarded.url}/v1/completions", headers=asked)
        assert (told.headers.get("access-control-allow-origin") == origin) is allowed
    with server.http_client() as client:
        told = client.options("/v1/completions", headers=asked)
        assert told.status_code == 405
        assert not [name for name in told.headers if name.startswith("access-control")]


def test_request_ids(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with server.http_client() as client, caplog.at_level(logging.INFO, "vattn.server.access"):
        assert (
            client.get("/version", headers={"X-Request-Id": "a.b:c_1-2"}).headers["x-request-id"]
            == "a.b:c_1-2"
        )
        for bad in ("", "a b", "x" * 129, "ä"):
            made = client.get("/version", headers={b"X-Request-Id": bad.encode()})
            assert len(made.headers["x-request-id"]) == 32
    record = caplog.records[0]
    assert (record.request_id, record.status) == ("a.b:c_1-2", 200)  # type: ignore[attr-defined]


def test_a_failure_tells_its_id_and_nothing_else(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("/secret")

    with server.http_client() as client, monkeypatch.context() as patch:
        patch.setattr("vattn.server.page.page._answer", fail)
        response = client.get("/", headers={"X-Request-Id": "me"})
    error = error_of(response, 500)
    assert "me" in error["message"]
    assert "secret" not in response.text
    assert "OSError: /secret" in caplog.text


def test_what_does_not_exist(server: RunningServer) -> None:
    with server.http_client() as client:
        assert error_of(client.get("/v1/nothing"), 404)["type"] == "not_found_error"
        response = client.delete("/health")
        error_of(response, 405)
        assert response.headers["allow"] == "GET"
        assert client.get("/docs").status_code == 404
        document = client.get("/openapi.json").json()
    assert "422" not in json.dumps(document)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: RunningServer, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        sock.sendall(head + body)
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        else:
            while not server.state.admission.requests:
                server.call(_turn())
    server.wait_idle()  # would take as long as 400 tokens do, but for the abort
    with server.http_client() as client:
        figures = client.get("/metrics").text
    assert 'finished_reason="abort"' in figures


async def _turn() -> None:
    """One turn of the server's loop."""
