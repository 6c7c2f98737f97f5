"""The feed of the live page: what is in a snapshot, who gets it, and that it ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import httpx
import msgspec
import pytest

from tests.server_figures import FakeLLM, stats
from vattn.async_llm import AsyncLLM, LiveRequest
from vattn.engine_process.errors import EngineDeadError
from vattn.request import Status
from vattn.server.live import MAX_VIEWERS, LiveFeed, _Events
from vattn.server.live_snapshot import Rates, cells, make
from vattn.server.metrics import ServerMetrics
from vattn.server.settings import ServerSettings
from vattn.server.state import ServerState

if TYPE_CHECKING:
    from tests.server_fixtures import RunningServer

pytest_plugins = ["tests.server_fixtures"]

PATIENCE_S = 60.0
KEYS = {
    "version", "time", "uptime_s", "model", "engine", "queue", "throughput", "latency", "totals",
    "memory", "driver", "map", "requests", "requests_left_out",
}  # fmt: skip


def state_of(llm: FakeLLM) -> ServerState:
    fake, settings = cast(AsyncLLM, llm), ServerSettings()
    return ServerState(fake, settings, cast(Any, None), ServerMetrics(fake, settings))


def request(handle: int = 7, *, first_token_s: float = 0.0) -> LiveRequest:
    return LiveRequest(f"cmpl-{handle}", 8, 16, 1, (3,), 4, 1.0, first_token_s, handle)


def decoded(text: str) -> str:
    """A row's cells, one letter each."""
    rest, out = text, ""
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789"))
        out += rest[digits] * int(rest[:digits])
        rest = rest[digits + 1 :]
    return out


def event(line: bytes) -> dict[str, Any]:
    assert line.startswith(b"data: ")
    assert line.endswith(b"\n\n")
    found: dict[str, Any] = json.loads(line[6:])
    return found


async def following(feed: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    return event(await asyncio.wait_for(anext(feed), PATIENCE_S))


# A snapshot ---------------------------------------------------------------------------------------


def test_cells_are_runs_of_letters() -> None:
    assert cells(bytes([1, 1, 2, 3, 5, 4, 0, 0])) == "2l1s1c1k1x2."
    assert cells(bytes([0x81, 0x81, 1, 0x84])) == "2L1l1X"
    assert cells(bytes(128)) == "128."
    assert decoded("2L1l1X") == "LLlX"


def test_snapshot_of_a_server_that_serves() -> None:
    llm = FakeLLM(stats(3, maps=4, adopted=9), requests=[request(first_token_s=1.5), request(8)])
    state = state_of(llm)
    pages = asyncio.run(llm.memory_map())
    found = make(state, Rates(), pages)
    assert set(found) == KEYS
    assert found["engine"]["state"] == "up"
    assert found["queue"] == {"running": 1, "waiting": 2, "max_waiting": 2048}
    states = found["memory"]["states"]
    assert sum(states.values()) == found["memory"]["created_bytes"]
    assert found["driver"]["calls"]["map"] == {"count": 4, "per_s": None, "seconds": 0.004}
    assert found["driver"]["remaps_avoided"] == 9
    (row,) = found["map"]["rows"]
    assert row["request"] == "cmpl-7"
    assert row["cells"] == "1L1l1s1c2."
    first, second = found["requests"]
    assert (first["state"], first["time_to_first_token_s"]) == ("running", 0.5)
    assert (second["state"], second["time_to_first_token_s"]) == ("waiting", None)
    # It waits by figures that are older than its first token.
    llm.latest = msgspec.structs.replace(stats(1), requests=[(7, 0, int(Status.WAITING), 5)])
    assert make(state, Rates(), pages)["requests"][0]["state"] == "running"
    llm.latest = msgspec.structs.replace(llm.latest, monotonic_s=2.0)
    assert make(state, Rates(), pages)["requests"][0]["state"] == "waiting"
    assert found["latency"]["inter_token"] == {"count": 0, "p50": None, "p90": None, "p99": None}
    json.dumps(found)


def test_latencies_of_those_that_are_told_nothing_yet() -> None:
    now = time.monotonic()
    seen = [(first_s and now - 10 + first_s, streamed) for first_s, streamed in
            ((0.5, False), (0.5, True), (0.0, False))]  # fmt: skip
    live = [
        LiveRequest(f"cmpl-{i}", 8, 16, 2, (20, 1), 4, now - 10, first_s, i, streamed)
        for i, (first_s, streamed) in enumerate(seen)
    ]
    llm = FakeLLM(stats(1), requests=live)
    state = state_of(llm)
    found = make(state, Rates(), None)["latency"]
    assert found["time_to_first_token"]["count"] == 1
    assert found["time_to_first_token"]["p50"] == pytest.approx(0.5, rel=0.05)
    assert found["inter_token"]["count"] == 19
    assert found["inter_token"]["p50"] == pytest.approx(0.5, rel=0.05)
    llm.requests = []
    assert make(state, Rates(), None)["latency"]["time_to_first_token"]["count"] == 0


def test_snapshot_without_an_engine() -> None:
    llm = FakeLLM(is_ready=False, last_error=EngineDeadError("killed by signal 9"))
    found = make(state_of(llm), Rates(), None)
    assert set(found) == KEYS
    assert (found["engine"]["state"], found["engine"]["error"]) == (
        "restarting", "killed by signal 9",
    )  # fmt: skip
    assert found["memory"] is found["driver"] is found["map"] is None
    llm.last_error = EngineDeadError("no such model", restarting=False)
    assert make(state_of(llm), Rates(), None)["engine"]["state"] == "down"


def test_rates_are_of_the_last_two_seconds() -> None:
    rates = Rates()
    assert rates.per_second(0.0, {"a": 0}) == {"a": None}
    assert rates.per_second(0.5, {"a": 5}) == {"a": 10.0}
    for tenth in range(6, 40):
        found = rates.per_second(tenth / 10, {"a": 5})
    assert found == {"a": 0.0}
    # What grew while nobody looked did not grow now.
    assert rates.per_second(100.0, {"a": 1000}) == {"a": None}


# Viewers ------------------------------------------------------------------------------------------


def test_snapshots_are_made_once_for_all_viewers_and_only_while_there_are_any() -> None:
    async def run() -> None:
        llm = FakeLLM(stats(1))
        feed = LiveFeed(state_of(llm))
        assert not feed.is_running
        async with aclosing(feed.watch(0.25)) as one, aclosing(feed.watch(0.25)) as two:
            first, second = await asyncio.gather(following(one), following(two))
            assert first["time"] == second["time"]
            assert llm.maps == 1
            assert feed.viewers == 2
            assert feed.is_running
            await one.aclose()
            assert feed.viewers == 1
            assert feed.is_running
            assert (await following(two))["time"] > first["time"]
        assert feed.viewers == 0
        assert not feed.is_running
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        async with aclosing(feed.watch(0.25)) as again:
            assert (await following(again))["version"] == 1

    asyncio.run(run())


def test_slow_viewer_misses_snapshots() -> None:
    async def run() -> None:
        llm = FakeLLM(stats(1))
        feed = LiveFeed(state_of(llm))
        async with aclosing(feed.watch(0.25)) as slow, aclosing(feed.watch(0.25)) as quick:
            await following(slow)
            for _ in range(4):
                latest = await following(quick)
            # What it gets next was not made while it slept: nothing had queued up.
            assert (await following(slow))["time"] >= latest["time"]
            assert llm.maps <= 6

    asyncio.run(run())


def test_stream_ends_with_the_server() -> None:
    async def run() -> None:
        llm = FakeLLM(stats(1), requests=[request()])
        state = state_of(llm)
        feed = LiveFeed(state)
        async with aclosing(feed.watch(0.25)) as viewer:
            await following(viewer)
            state.draining = True
            while (await following(viewer))["engine"]["state"] != "draining":
                pass
            llm.requests = []
            async with asyncio.timeout(PATIENCE_S):
                async for _ in viewer:
                    pass
        assert not feed.is_running

    asyncio.run(run())


def test_failure_of_the_feed_reaches_its_viewers() -> None:
    class Broken(FakeLLM):
        def live_requests(self) -> list[LiveRequest]:
            raise RuntimeError("broken")

    async def run() -> None:
        feed = LiveFeed(state_of(Broken(stats(1))))
        with pytest.raises(RuntimeError, match="broken"):
            async with aclosing(feed.watch(0.25)) as viewer:
                await following(viewer)
        assert feed.viewers == 0
        assert not feed.is_running

    asyncio.run(run())


# A real server ------------------------------------------------------------------------------------


def feed_of(server: RunningServer) -> LiveFeed | None:
    found: LiveFeed | None = getattr(server.app.state, "live_feed", None)
    return found


def test_running_request_moves_in_the_stream(server: RunningServer) -> None:
    seen: list[dict[str, Any]] = []
    done = threading.Event()

    def generate() -> None:
        with server.client() as client:
            while not done.is_set():
                client.completions.create(
                    model="embedded", prompt=list(range(5, 45)), max_tokens=400,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip

    thread = threading.Thread(target=generate)
    with server.http_client() as http, http.stream("GET", "/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        thread.start()
        try:
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                found = json.loads(line[6:])
                assert set(found) == KEYS
                if found["requests"] and found["map"]:
                    seen.append(found)
                if (
                    len({s["requests"][0]["output_tokens"][0] for s in seen}) >= 3
                    and any(row["request"] for s in seen for row in s["map"]["rows"])
                    and any(s["memory"]["states"]["live"] for s in seen)
                    and found["throughput"]["generation_tokens_per_s"]
                ):
                    break
        finally:
            done.set()
            thread.join()
    last = seen[-1]
    assert last["requests"][0]["prompt_tokens"] == 40
    assert last["requests"][0]["max_tokens"] == 400
    rows = [(s, row) for s in seen for row in s["map"]["rows"] if row["request"]]
    found, row = rows[0]
    assert row["request"] in {request["id"] for request in found["requests"]}
    assert len(decoded(row["cells"])) == found["map"]["cells"]
    assert decoded(row["cells"])[0] in "lLsS"
    assert last["driver"]["count"] > 0
    # It is no stream: nobody has been told of its tokens.
    first = next(s for s in seen if any(s["requests"][0]["output_tokens"]))
    assert first["latency"]["time_to_first_token"]["count"] > 0
    assert last["throughput"]["generation_tokens_per_s"] > 0
    assert last["totals"]["generation_tokens"] > 0
    for found in seen:
        speed = found["throughput"]
        most = (speed["steps_per_s"] or 0) * server.llm.facts.max_num_seqs
        assert (speed["generation_tokens_per_s"] or 0) <= most


def test_viewer_that_leaves_stops_the_feed(server: RunningServer) -> None:
    with server.http_client() as http:
        with http.stream("GET", "/live") as response:
            next(response.iter_lines())
        feed = feed_of(server)
        assert feed is not None

        async def left() -> None:
            while feed.viewers or feed.is_running:
                await asyncio.sleep(0.01)

        server.call(asyncio.wait_for(left(), PATIENCE_S))
        found = http.get("/live/snapshot").json()
    assert set(found) == KEYS
    assert found["model"] == server.settings.served_model_names[0]
    assert not feed.is_running


def test_limits_of_the_stream(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.http_client() as http:
        for interval in ("0.1", "61", "nan"):
            response = http.get("/live", params={"interval": interval})
            assert response.status_code == 400
            assert "interval" in response.json()["error"]["message"]
        assert http.get("/live/snapshot").status_code == 200  # the feed is there
        monkeypatch.setattr(LiveFeed, "viewers", MAX_VIEWERS)
        response = http.get("/live")
        assert response.status_code == 503
        assert response.headers["retry-after"]


def test_a_viewer_that_is_cut_gives_its_place_back() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if "body" in message:
            raise OSError("cut")

    async def run() -> None:
        made = events()
        with pytest.raises(OSError, match="cut"):
            await _Events(made).stream_response(send)
        assert closed

    asyncio.run(run())


def test_feed_needs_a_key() -> None:
    from vattn.server.app import build_app

    async def run() -> None:
        settings = ServerSettings(api_keys=("secret",))
        app = build_app(cast(AsyncLLM, FakeLLM(stats(1))), settings)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for path in ("/live", "/live/snapshot"):
                assert (await client.get(path)).status_code == 401
            key = {"Authorization": "Bearer secret"}
            response = await client.get("/live/snapshot", headers=key)
            assert response.status_code == 200
            assert set(response.json()) == KEYS

    asyncio.run(run())
