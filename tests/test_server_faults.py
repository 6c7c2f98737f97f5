"""Engine processes that die, hang, fail or stay away, as clients of the server see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine_cases import EMBEDDED_PATH
from tests.failing_llm import BREAKS_NUMBERS, BREAKS_STEP, FAILS, STARTS
from tests.raw_http import Reply, post
from tests.running_server import PATIENCE_S, RunningServer, running_server
from vattn.async_llm import AsyncLLM
from vattn.engine_process import supervisor
from vattn.server.run import serve
from vattn.server.settings import ServerSettings

ENGINE: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 512, "page_bytes": 4096}
LONG = {"prompt": "A transaction is", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 8}
TOLD_S = 5.0 if "CI" in os.environ else 1.0  # machines of CI do much at once


def children() -> set[str]:
    """Processes that this one has started, zombies too."""
    found: set[str] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            found.update((task / "children").read_text().split())
    return found


def directories() -> set[str]:
    """Of the sockets of this process."""
    ours = Path(tempfile.gettempdir()).glob(f"*vattn-*{os.getpid()}-*")
    return {str(path) for path in ours}


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    before = children(), directories()
    yield
    assert (children(), directories()) == before


@pytest.fixture(scope="module")
def failing() -> Iterator[RunningServer]:
    with running_server(
        EMBEDDED_PATH,
        dtype="float32",
        llm_factory="tests.failing_llm:make",
        engine_timeout_s=4.0,
        **ENGINE,
    ) as server:
        yield server


@pytest.fixture
def server(failing: RunningServer) -> RunningServer:
    """With an engine that serves, whatever the test before did."""
    until_well(failing)
    return failing


@pytest.fixture
def text(server: RunningServer) -> str:
    """What a sound engine says."""
    found: str = run(post(server.port, SHORT)).texts()[0]
    return found


def run(what: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(2 * PATIENCE_S):
            return await what

    return asyncio.run(bounded())


def until_well(server: RunningServer) -> None:
    """Returns when /health says so."""
    deadline = time.monotonic() + PATIENCE_S
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def counters(server: RunningServer) -> dict[tuple[str, ...], float]:
    """All that must never go down."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if family.type == "counter" or sample.name.endswith(("_bucket", "_count", "_sum")):
                labels = (f"{name}={value}" for name, value in sorted(sample.labels.items()))
                found[sample.name, *labels] = sample.value
    return found


def test_everybody_is_told_when_the_engine_is_killed(server: RunningServer, text: str) -> None:
    before, pids, pid = counters(server), children(), server.llm.engine_pid
    sockets = directories()
    assert pid is not None
    restarts = server.llm.restarts
    assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()  # and so leaves nothing there

    async def crowd() -> tuple[list[Reply], list[Reply], Reply, httpx.Response]:
        streams = [Reply() for _ in range(20)]
        tasks = [
            asyncio.create_task(post(server.port, {**LONG, "stream": True}, reply))
            for reply in streams
        ]
        others = [asyncio.create_task(post(server.port, LONG)) for _ in range(4)]
        # Four run, and the others wait: they have had nothing yet.
        begun = [asyncio.create_task(reply.begun.wait()) for reply in streams]
        await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
        while server.state.admission.samples < 24:
            await asyncio.sleep(0)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
        wholes = await asyncio.gather(*others)
        told_s = time.monotonic() - killed
        assert server.llm.restarts == restarts  # all were told before there was another engine
        late = await post(server.port, SHORT)
        async with httpx.AsyncClient() as client:
            health = await client.get(f"{server.url}/health")
        red_s = time.monotonic() - killed
        print(f"after the kill: all were told in {told_s:.3f} s, /health was red in {red_s:.3f} s")
        assert red_s < TOLD_S
        assert server.llm.restarts == restarts
        for each in begun:
            each.cancel()
        return streams, wholes, late, health

    streams, wholes, late, health = run(crowd())
    begun = [reply for reply in streams if reply.status == 200]
    assert 1 <= len(begun) <= 4
    for reply in begun:
        *_, last = reply.events
        assert last["error"]["type"] == "server_error"
        assert "SIGKILL" in last["error"]["message"]
    for reply in (*wholes, *(reply for reply in streams if reply not in begun)):
        assert reply.status == 503, reply.raw
        assert int(reply.headers["retry-after"]) >= 1
        assert "SIGKILL" in reply.json["error"]["message"]
    assert (late.status, health.status_code) == (503, 503)
    assert "SIGKILL" in health.json()["error"]["message"]
    until_well(server)
    assert server.llm.restarts == restarts + 1
    assert str(pid) not in children()
    assert len(children()) == len(pids)
    assert not Path(f"/proc/{pid}").exists()
    assert len(directories()) == len(sockets)
    assert run(post(server.port, SHORT)).texts() == [text]
    after = counters(server)
    assert [name for name, value in before.items() if after[name] < value] == []


def test_an_engine_that_hangs_is_replaced(server: RunningServer, text: str) -> None:
    pid = server.llm.engine_pid
    assert pid is not None

    async def hangs() -> Reply:
        reply = Reply()
        task = asyncio.create_task(post(server.port, {**LONG, "stream": True}, reply))
        await reply.begun.wait()
        os.kill(pid, signal.SIGSTOP)
        return await task

    *_, last = run(hangs()).events
    assert "engine_timeout_s=4" in last["error"]["message"]
    until_well(server)
    assert not Path(f"/proc/{pid}").exists()
    assert run(post(server.port, SHORT)).texts() == [text]


def test_a_step_that_fails_is_that_of_its_requests(server: RunningServer, text: str) -> None:
    pid = server.llm.engine_pid
    breaks = {**SHORT, "prompt": [BREAKS_STEP, 500, 501]}

    async def crowd() -> tuple[list[Reply], Reply, list[Reply]]:
        running = [Reply() for _ in range(3)]
        tasks = [
            asyncio.create_task(post(server.port, {**LONG, "stream": True}, reply))
            for reply in running
        ]
        await asyncio.gather(*(reply.begun.wait() for reply in running))
        failing = asyncio.create_task(post(server.port, breaks))
        waiting = [asyncio.create_task(post(server.port, SHORT)) for _ in range(8)]
        await asyncio.gather(*tasks)
        return running, await failing, await asyncio.gather(*waiting)

    running, failing, waiting = run(crowd())
    assert failing.status == 500
    assert FAILS in failing.json["error"]["message"]
    for reply in running:
        assert FAILS in reply.events[-1]["error"]["message"]
    done = [reply for reply in waiting if reply.status == 200]
    assert done  # those that were not in the step that failed
    for reply in done:
        assert reply.texts() == [text]
    for reply in waiting:
        assert reply in done or FAILS in reply.json["error"]["message"]
    assert server.llm.engine_pid == pid
    assert run(post(server.port, SHORT)).texts() == [text]
    server.wait_idle()


def test_numbers_that_break_are_those_of_one_request(server: RunningServer, text: str) -> None:
    pid = server.llm.engine_pid
    breaks = {**LONG, "prompt": [BREAKS_NUMBERS, 500, 501], "stream": True}

    async def crowd(body: dict[str, Any], beside: int) -> tuple[Reply, list[Reply]]:
        failing = asyncio.create_task(post(server.port, body))
        others = [asyncio.create_task(post(server.port, SHORT)) for _ in range(beside)]
        return await failing, await asyncio.gather(*others)

    # Again and again, so that the others come to have its pages.
    for round_ in range(4):
        failing, others = run(crowd({**breaks, "stream": round_ % 2 == 0}, 6))
        # A stream that fails before its first text is no stream.
        error = failing.json if failing.status == 500 else failing.events[-1]
        assert failing.status == 500 or round_ % 2 == 0, failing.raw
        assert error["error"]["type"] == "server_error"
        assert [reply.texts() for reply in others] == [[text]] * 6
    assert server.llm.engine_pid == pid
    server.wait_idle()


def test_a_server_without_an_engine_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTS, str(tmp_path / "starts"))
    monkeypatch.setattr(supervisor, "MAX_FAILED_STARTS", 1)
    found: list[Reply] = []
    threads = []

    def make() -> AsyncLLM:
        return AsyncLLM(
            EMBEDDED_PATH,
            dtype="float32",
            llm_factory="tests.failing_llm:make_once",
            log_level="error",
            **ENGINE,
        )

    async def kills(port: int, pid: int) -> None:
        reply = Reply()
        task = asyncio.create_task(post(port, {**LONG, "stream": True}, reply))
        await reply.begun.wait()
        os.kill(pid, signal.SIGKILL)
        found.append(await task)

    def told(url: str, llm: AsyncLLM) -> None:
        port, pid = int(url.rpartition(":")[2]), llm.engine_pid
        assert pid is not None
        threads.append(threading.Thread(target=asyncio.run, args=(kills(port, pid),)))
        threads[0].start()

    assert serve(make, ServerSettings(port=0), told) == 1
    threads[0].join(PATIENCE_S)
    assert "SIGKILL" in found[0].events[-1]["error"]["message"]
