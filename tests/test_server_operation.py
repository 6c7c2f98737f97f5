"""The server's operation: keys, limits, slow clients, ids, CORS, memory, disconnects."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.running_server import PATIENCE_S, RunningServer, paused, running_server
from vattn.server.auth import Keys

pytest_plugins = ("tests.server_fixtures",)

LONG = {"prompt": "A transaction is", "max_tokens": 400, "ignore_eos": True}
SHORT = {"prompt": "A transaction is", "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    """With keys, CORS, and limits that are easily met."""
    with running_server(
        api_keys=("one", "two"),
        admin_keys=("boss",),
        allowed_origins=("https://example.org",),
        max_body_bytes=1 << 20,
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


def exchange(server: RunningServer, *parts: bytes, until: bytes | None = None) -> bytes:
    """Sends bytes on a connection of its own; what comes until the server closes it, or this."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        for part in parts:
            sock.sendall(part)
        return received(sock, until)


def received(sock: socket.socket, until: bytes | None = None) -> bytes:
    """All until the server closes the connection, or to the end of an answer."""
    found = b""
    while (until is None or until not in found) and (data := sock.recv(1 << 16)):
        found += data
    return found


@contextmanager
def posted(
    server: RunningServer, body: dict[str, Any], head: bytes = b""
) -> Iterator[socket.socket]:
    """A completion that is asked for on a connection of its own, until it is closed."""
    data = json.dumps(body).encode()
    head += b"Content-Length: %d\r\nContent-Type: application/json\r\n" % len(data)
    head += f"Authorization: Bearer {server.key}\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + data)
        yield sock


@pytest.mark.parametrize(
    "value", [None, "Bearer", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer tw"]
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


@pytest.mark.parametrize("key", ["one", "two", "boss"])
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


@pytest.mark.parametrize(
    "budget", ["much", -1, 0, True, None, 1.5, "1e400GiB", 2**70, "９MiB", "2\u212aB"]
)
def test_a_budget_must_be_a_size(client: httpx.Client, budget: object) -> None:
    client.headers["Authorization"] = "Bearer boss"
    response = client.post("/admin/memory", json={"budget": budget})
    assert error_of(response, 400)["param"] == "budget"


def test_large_bodies_are_refused_unread(guarded: RunningServer) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer one\r\n"
        b"Content-Type: application/json\r\n"
    )
    told = exchange(guarded, head + b"Content-Length: 104857600\r\n\r\n", until=b"}}")
    assert told.startswith(b"HTTP/1.1 413 ")
    assert b"--max-body-bytes" in told


def test_large_bodies_are_refused_while_they_come(
    guarded: RunningServer, client: httpx.Client
) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer one\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n100001\r\n"
    )
    told = exchange(guarded, head, b"x" * ((1 << 20) + 1), until=b"}}")
    assert told.startswith(b"HTTP/1.1 413 ")

    def endless() -> Iterator[bytes]:
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


def test_slow_clients_are_cut_off(guarded: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    cases = [
        ([b""], 408),
        ([b"GET / HT"], 408),
        ([post, b"Authorization: Bearer one\r\n\r\n", b"{"], 408),
        # One without a key has had its answer, and must not hold the connection either.
        ([post + b"\r\n", b"{"], 401),
        ([chunked, b"9\r\n{"], 401),
        ([chunked, b"1\r\n{\r\n"], 401),
    ]
    with monkeypatch.context() as patch, ThreadPoolExecutor(len(cases)) as pool:
        patch.setattr(guarded.http.config.http_protocol_class, "receive_s", 2.0)
        answers = pool.map(lambda case: exchange(guarded, *case[0]), cases)
        for (parts, status), told in zip(cases, answers, strict=True):
            assert told.startswith(b"HTTP/1.1 %d " % status), parts
            assert told.count(b"HTTP/1.1 ") == 1
    # Its body was whole: the connection is good for another request.
    more = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    told = exchange(guarded, chunked + b"2\r\n{}\r\n0\r\n\r\n", more)
    assert [part[:3] for part in told.split(b"HTTP/1.1 ")[1:]] == [b"401", b"200"]


def test_who_does_not_read_is_cut_off(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol: Any = server.http.config.http_protocol_class
    connect = protocol.connection_made

    def small(self: Any, transport: Any) -> None:
        connect(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=4096)

    monkeypatch.setattr(protocol, "connection_made", small)
    monkeypatch.setattr(protocol, "stall_s", 0.2)
    with posted(server, {**LONG, "n": 4, "logprobs": 20, "stream": True}) as sock:
        server.wait_running(1)
        server.wait_idle()
        told = b""
        with suppress(ConnectionResetError):
            while data := sock.recv(1 << 16):
                told += data
    assert b"data: [DONE]" not in told


def test_heads_are_limited(guarded: RunningServer) -> None:
    told = exchange(guarded, b"GET / HTTP/1.1\r\nX: ", *[b"x" * 4096] * 16)
    assert told.startswith(b"HTTP/1.1 431 ")
    assert exchange(guarded, b"no http\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_full_queue_answers_429(guarded: RunningServer, client: httpx.Client) -> None:
    with paused(guarded.llm), posted(guarded, LONG), posted(guarded, LONG):
        guarded.wait_running(2)
        response = client.post("/v1/completions", json=SHORT)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    guarded.wait_idle()
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_what_never_fits_is_not_told_to_retry(client: httpx.Client) -> None:
    many = client.post("/v1/completions", json={**SHORT, "prompt": ["a", "b", "c"]})
    assert "retry-after" not in many.headers
    assert error_of(many, 413)["message"].startswith("3 samples")
    tokens = client.post("/v1/completions", json={**LONG, "max_tokens": 450, "n": 2})
    assert "tokens" in error_of(tokens, 413)["message"]


def test_a_request_may_take_so_long(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with what it has, as OpenAI's clients know it; here at once."""
    settings = replace(server.settings, request_timeout_s=1e-3)
    monkeypatch.setattr(server.state, "settings", settings)
    with server.http_client() as client:
        found = client.post("/v1/completions", json=LONG).json()
    (choice,) = found["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    assert found["usage"]["completion_tokens"] < LONG["max_tokens"]


def test_its_time_runs_from_its_arrival(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from when its tokens have been found, which takes some time here."""
    settings, given = replace(server.settings, request_timeout_s=1000.0), []
    tokenizer, generate = server.llm.tokenizer, server.llm.generate

    class Slow:
        def encode(self, *args: Any, **options: Any) -> Any:
            time.sleep(0.05)
            return tokenizer.encode(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    def noted(*args: Any, **options: Any) -> Any:
        given.append(options["timeout_s"])
        return generate(*args, **options)

    monkeypatch.setattr(server.state, "settings", settings)
    monkeypatch.setattr(server.llm, "generate", noted)
    monkeypatch.setattr(server.llm._owner, "tokenizer", Slow())
    with server.http_client() as client:
        assert client.post("/v1/completions", json=SHORT).status_code == 200
    assert given[0] <= 1000 - 0.05


def test_cors_is_for_those_who_were_named(guarded: RunningServer, server: RunningServer) -> None:
    for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            # Of OpenAI's client for JavaScript.
            "Access-Control-Request-Headers": "authorization,x-stainless-lang",
        }
        told = httpx.options(f"{guarded.url}/v1/completions", headers=asked)
        assert (told.status_code == 200) is allowed
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


def test_an_id_may_come_twice_at_once(server: RunningServer) -> None:
    """Clients that try again and proxies do that; the engine tells the two apart."""
    head = b"X-Request-Id: same\r\nConnection: close\r\n"
    both = {**SHORT, "prompt": ["a", "b"]}
    with ExitStack() as stack:
        with paused(server.llm):
            sockets = [stack.enter_context(posted(server, body, head)) for body in (SHORT, both)]
            server.wait_running(3)
        for sock in sockets:
            told = received(sock)
            assert told.startswith(b"HTTP/1.1 200 "), told
            assert b'"id":"cmpl-same"' in told


def test_a_parameter_of_the_address_is_named(server: RunningServer) -> None:
    with server.http_client() as client:
        error = error_of(client.get("/live?interval=often"), 400)
    assert error["param"] == "interval"
    assert error["message"].startswith("interval='often'")


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
    with server.http_client() as client:
        before = aborts(client)
        with paused(server.llm):
            with posted(server, {**LONG, "stream": stream}):
                server.wait_running(1)
            server.wait_running(0)
        server.wait_idle()
        assert aborts(client) == before + 1


def aborts(client: httpx.Client) -> float:
    """How many requests were aborted."""
    found = [line for line in client.get("/metrics").text.splitlines() if '="abort"' in line]
    return sum(
        float(line.split()[-1]) for line in found if line.startswith("vattn:request_success_total")
    )
